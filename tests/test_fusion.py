"Every fusion by name in a learner of a picture and a text: trained, predicted with an input missing, traced, loaded again"
import pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import untyped
from fastai_multi.models.fusion import fusions

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope='module')
def loaders(shapes):
    return MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', text='caption', seed=0, bs=16, num_workers=0,
                                     outputs=dict(colour=CategoryBlock, area=RegressionBlock), item_tfms=Resize(32))

@pytest.mark.parametrize('name', fusions)
def test_a_learner_with_each_fusion(loaders, shapes, name, tmp_path):
    set_seed(0)
    learn = multi_learner(loaders, simple_cnn(2, width=4), fusion=name)
    start = learn.validate(0)[0]
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 4e-3)
    assert learn.validate(0)[0]<start
    picture = shapes/'images/00000.jpg'
    for item in ((picture, 'something red'), (picture, None), (None, 'something red')):
        answer = learn.predict(item)[0]
        assert answer.colour in loaders.train.named_parts()[1]['colour'].vocab
        assert answer.area==answer.area
    learn.export(tmp_path/'model.pkl')
    again = load_learner(tmp_path/'model.pkl').predict((picture, 'something red'))
    assert torch.allclose(again[2].colour, learn.predict((picture, 'something red'))[2].colour, atol=1e-5)

@pytest.mark.parametrize('name', fusions)
def test_each_fusion_is_traced_whole(loaders, name):
    learn = multi_learner(loaders, simple_cnn(2, width=4), fusion=name)
    model = learn.model.eval().cpu()
    xb = learn.dls.train.one_batch()[0].map(untyped)
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(xb)
        got = torch.compile(model, fullgraph=True, backend='eager')(xb)
    torch.testing.assert_close(tuple(got), tuple(want), atol=1e-5, rtol=1e-4)
