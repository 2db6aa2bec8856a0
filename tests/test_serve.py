"The web service answers like the learner, refuses bad requests, and shows a page that needs no internet"
import asyncio, base64, io, os, re
import pytest
from fastai.vision.all import *
from fastai_multi import *

for name in ('fastapi', 'httpx', 'prometheus_client', 'multipart', 'safetensors'): pytest.importorskip(name)
from fastapi.testclient import TestClient
from benchmarks.serve import load, serving
from fastai_multi.serve import Batcher, Limits, answer_all, make_app, page

@pytest.fixture(scope='module')
def learn(shapes):
    torch.manual_seed(0)
    dls = MultiDataLoaders.from_csv(shapes, image='file', text='caption', label_delim='|', item_tfms=Resize(32), bs=8,
                                    outputs=dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock),
                                    columns=dict(box=['x1','y1','x2','y2']), num_workers=0, seed=0)
    learn = multi_learner(dls, simple_cnn(2, 4))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

@pytest.fixture(scope='module')
def files(shapes, learn): return [shapes/f for f in learn.dls.valid.items['file'][:6]]

@pytest.fixture
def client(learn):
    with TestClient(make_app(learn, Limits(max_bytes=200_000, max_pixels=10_000, max_chars=50))) as client: yield client

def test_it_answers_as_the_learner(client, learn, files):
    answer = client.post('/predict', files=dict(image=files[0].read_bytes()), data=dict(text='a red circle')).json()
    with learn.no_bar(): wanted = learn.predict((files[0], 'a red circle')).to_dict('all')
    assert answer['kind']==wanted['kind'] and answer['tags']==wanted['tags']
    assert np.allclose(answer['box'], wanted['box'], atol=1e-3)
    assert abs(answer['kind_confidence']-wanted['kind_confidence'])<1e-5
    for part in (dict(data=dict(text='a red circle')), dict(files=dict(image=files[0].read_bytes()))):
        assert client.post('/predict', **part).json()['kind'] in learn.dls.vocab['kind']

def picture(size, form='PNG'):
    res = io.BytesIO()
    Image.new('RGB', size).save(res, form)
    return res.getvalue()

@pytest.mark.parametrize('request_,status,text', [
    (dict(data=dict(image='/etc/passwd')), 422, 'no file that a request names'),
    (dict(data=dict(image='../x.png', text='a')), 422, 'send it as a file'),
    (dict(files=dict(text=b'abc')), 422, 'is a text'),
    (dict(files=dict(image=b'no picture')), 422, 'is not a picture that can be read'),
    (dict(files=dict(image=picture((50, 50))[:60])), 422, 'is not a picture that can be read'),
    (dict(files=dict(image=picture((200, 200)))), 413, '200 x 200 pixels'),
    (dict(files=dict(image=b'0'*300_000)), 413, 'bytes; at most 200,000'),
    (dict(data=dict(text='a'*51)), 413, '51 characters'),
    (dict(data=dict(text='')), 422, 'at least one'),
    (dict(data=dict(price='3')), 422, "no input 'price'"),
    (dict(json=dict(text='a')), 415, 'Send a form'),
    (dict(data=dict(text=['a', 'b'])), 422, 'twice'),
    (dict(content=b'x', headers={'content-type': 'multipart/form-data; boundary=a'}), 400, 'cannot be read'),
    (dict(content=iter([b'text=a'])), 411, 'Content-Length')])
def test_bad_requests(client, request_, status, text):
    answer = client.post('/predict', **request_)
    assert answer.status_code==status and text in answer.json()['error'], answer.text
    assert client.post('/predict', data=dict(text='a circle')).status_code==200

def test_what_it_says_of_itself(client):
    client.post('/predict', data=dict(text='a circle'))
    client.post('/predict', data=dict(image='a'))
    schema = client.get('/schema').json()
    assert [i['form'] for i in schema['inputs']]==['picture','text']
    assert [o['box'] for o in schema['outputs']]==[False,False,True]
    metrics = client.get('/metrics').text
    for line in ('predict_requests_total{status="200"} 1.0', 'predict_requests_total{status="422"} 1.0',
                 'predict_batch_size_count 1.0', 'predict_seconds_count 2.0'): assert line in metrics, line
    assert client.get('/').text==page
    assert not re.search(r'https?:|//[a-z]+\.', page)

def test_together_as_alone(learn, files):
    "Simultaneous requests form one batch and get the same answers as alone, and only a bad request fails"
    items = [dict(image=f.read_bytes(), text=t) for f,t in zip(files, ['a circle', '', 'red', 'big', 'left', 'a star'])]
    alone = [answer_all(learn, [o])[0]['kind_confidence'] for o in items]
    async def ask():
        batcher = Batcher(learn, 8, wait=.05)
        sizes = []
        batcher.sizes.append(sizes.append)
        running = asyncio.create_task(batcher.run())
        asked = [*items, dict(image=b'broken')]
        answers = await asyncio.gather(*(batcher.answer(o) for o in asked), return_exceptions=True)
        running.cancel()
        return answers, sizes
    answers,sizes = asyncio.run(ask())
    assert sizes==[7] and isinstance(answers[-1], Exception)
    assert np.allclose([a['kind_confidence'] for a in answers[:-1]], alone, atol=1e-5)

@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    "A learner of masks, depths and objects, and a picture file that is larger than the network's input"
    path = multi_rooms(tmp_path_factory.mktemp('rooms'), n=16, size=96)
    df = pd.read_csv(path/'items.csv')
    boxes = pd.DataFrame(dict(image=df.image, x1=10, y1=20, x2=50, y2=60, kind=['ball','cube']*8))
    outputs = dict(part=MaskBlock(list('abcd')), depth=DepthBlock(scale=.001), things=ObjectsBlock(kind=CategoryBlock))
    dls = MultiDataLoaders.from_df(df, path, image='image', outputs=outputs, objects=boxes, item_tfms=Resize(64), bs=4,
                                   seed=0, num_workers=0)
    learn = multi_learner(dls, simple_cnn(3, 4), heads=dict(things=dict(width=32, convs=1)))
    learn.model.heads['things'].objects.cls_logits.bias.data.fill_(1.)    # gives objects to draw
    return learn, path/df.image[0]

def test_values_for_each_pixel_are_packed(dense):
    learn,file = dense
    with TestClient(make_app(learn)) as client: res = client.post('/predict', files=dict(image=file.read_bytes())).json()
    with learn.no_bar(): wanted = learn.predict(file)[0]
    for name,dtype in dict(part='uint8', depth='float32').items():
        m = res[name]
        assert (m['shape'],m['dtype'])==([64,64],dtype)
        found = np.frombuffer(base64.b64decode(m['base64']), m['dtype']).reshape(m['shape'])
        assert np.allclose(found, wanted[name].numpy(), atol=1e-4)
    assert [o['kind'] for o in res['things']]==[o['kind'] for o in wanted.things]

def test_the_answer_as_a_picture(dense, learn, client):
    before = plt.get_fignums()
    with TestClient(make_app(dense[0])) as of_rooms:
        res = of_rooms.post('/picture', files=dict(image=dense[1].read_bytes()))
    assert res.headers['content-type']=='image/png'
    im = Image.open(io.BytesIO(res.content))
    assert min(im.size)>300
    if 'SCREENSHOTS' in os.environ: im.save(os.environ['SCREENSHOTS']+'/picture.png')
    assert client.post('/picture', data=dict(text='a red circle')).status_code==200
    assert client.post('/picture', data=dict(image='/etc/passwd')).status_code==422
    assert plt.get_fignums()==before

def test_no_answer_in_time(learn):
    with TestClient(make_app(learn, Limits(timeout=0.))) as client:
        answer = client.post('/predict', data=dict(text='a circle'))
        assert answer.status_code==503 and 'within 0 seconds' in answer.json()['error']

@pytest.fixture(scope='module')
def service(learn, tmp_path_factory):
    "The service of a bundle in its own process"
    folder = tmp_path_factory.mktemp('serve')/'bundle'
    learn.save_bundle(folder, metrics=False)
    with serving(folder) as service: yield service

def test_many_requests(service, files):
    "Each of two hundred requests from eight clients is answered, several in a batch, and the memory does not grow"
    url,process = service
    items = [(f.read_bytes(), 'a red circle') for f in files]
    res = load(url, process, items, requests=200, clients=8, every=100)
    assert res.errors.sum()==0
    assert (res.batch[1:]>1.5).all()
    assert res.memory_mb.iloc[2]-res.memory_mb.iloc[1]<30

@pytest.mark.parametrize('width', [390, 1200])
def test_the_page(service, files, tmp_path, width):
    url,_ = service
    sync_api = pytest.importorskip('playwright.sync_api')
    chromium = shutil.which('chromium')
    if chromium is None: pytest.skip('Chromium is not installed')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        tab = browser.new_page(viewport=dict(width=width, height=900))
        asked = []
        tab.on('request', lambda r: asked.append(r.url))
        tab.goto(url)
        tab.set_input_files('#in-image', str(files[0]))
        tab.fill('#in-text', 'a red circle on the left')
        tab.click('button[type=submit]')
        tab.wait_for_selector('#answer td')
        tab.wait_for_selector('#drawn:not([hidden])')
        assert tab.evaluate("document.querySelector('#drawn').naturalWidth")>300
        assert not tab.is_visible('#seen-image')
        table = tab.inner_text('#answer')
        for n in ('kind', 'tags', 'box'): assert n in table
        assert tab.evaluate('document.documentElement.scrollWidth')<=width
        assert all(u.startswith((url, 'blob:')) for u in asked)
        tab.screenshot(path=os.environ.get('SCREENSHOTS', str(tmp_path))+f'/page-{width}.png', full_page=True)
        tab.click('button[type=reset]')
        assert not tab.is_visible('#drawn')
        tab.click('button[type=submit]')
        tab.wait_for_function("document.querySelector('#error').textContent.includes('at least one')")
        browser.close()


def test_numbers_and_rows_are_sent_as_json():
    df = pd.DataFrame(dict(size=np.arange(20.), colour=['red','blue']*10, a=np.arange(20.), b=1., kind=['cup','hat']*10))
    dls = MultiDataLoaders.from_df(df, cat_names=['colour'], cont_names=['size'], features=['a','b'], bs=4, seed=0,
                                   outputs=dict(kind=CategoryBlock), num_workers=0)
    learn = multi_learner(dls)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    with TestClient(make_app(learn)) as client:
        forms = {i['name']: i['form'] for i in client.get('/schema').json()['inputs']}
        assert forms==dict(features='numbers', row='row')
        row = '{"size": 3, "colour": "blue"}'
        answer = client.post('/predict', data=dict(row=row, features='[3, 1]')).json()
        with learn.no_bar(): wanted = learn.predict(dict(row=dict(size=3, colour='blue'), features=[3.,1.]))
        assert abs(answer['kind_confidence']-wanted[0].confidence['kind'])<1e-5
        for part,said in ((dict(features='[3]'), '1 numbers, where 2 are expected'), (dict(features='x'), 'takes 2 numbers'),
                          (dict(row='[3]'), 'columns with their values'), (dict(row='{"sise": 3}'), "Unknown column 'sise'"),
                          (dict(row='{"size": "big"}'), "holds 'big'")):
            refused = client.post('/predict', data=part)
            assert refused.status_code==422 and said in refused.json()['error'], refused.text
