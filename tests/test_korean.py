"""The Korean pages: every cell of prose is a translation of the current English text, and the code is that of the
English notebooks, which run like all others."""
import ast, sys
from copy import deepcopy
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'docs'))
import korean
from outputs import text_of

def test_no_translation_is_missing_or_stale():
    assert not korean.faults(), 'Translate in docs/korean.md, then `python docs/korean.py --seen`'

def test_a_changed_cell_is_noticed(tmp_path, monkeypatch):
    "Of the English cells, one is unchanged, one is changed and one is not translated"
    said = '<!-- notebook a.ipynb -->\n\n<!-- aa %s -->\n하나\n\n<!-- bb %s -->\n둘\n\n<!-- cc -->\n셋\n'
    (tmp_path/'korean.md').write_text(said % (korean.digest('one'), korean.digest('two')), encoding='utf-8')
    monkeypatch.setattr(korean, 'file', tmp_path/'korean.md')
    cells = [dict(id=i, cell_type='markdown', source=s) for i,s in dict(aa='one', bb='two, new', dd='four').items()]
    monkeypatch.setattr(korean, 'cells_of', lambda name: cells)
    assert korean.faults() == ['a.ipynb: there is no cell cc', 'a.ipynb: the English text of cell bb has changed',
                               'a.ipynb: cell dd is not translated']
    korean.mark_seen()
    assert korean.faults() == ['a.ipynb: there is no cell cc', 'a.ipynb: cell dd is not translated']
    assert [c['source'] for c in korean.translate('a.ipynb', cells)] == ['하나', '둘', 'four']

@pytest.mark.parametrize('name', korean.names())
def test_code_is_the_english_notebooks(name):
    "The code differs only in its comments"
    english = [c for c in korean.cells_of(name) if c['cell_type']=='code']
    translated = [c for c in korean.translate(name, deepcopy(korean.cells_of(name))) if c['cell_type']=='code']
    assert [c['id'] for c in translated] == [c['id'] for c in english]
    for a,b in zip(english, translated):
        assert ast.dump(ast.parse(text_of(a['source']))) == ast.dump(ast.parse(text_of(b['source'])))
        assert a['outputs'] == b['outputs']

@pytest.mark.parametrize('name', korean.names())
def test_prose_is_korean(name):
    "Every translated cell has Hangul in it, except links to the other language"
    for i,(_,text) in korean.translations()[name].items():
        assert not text or any('가'<=c<='힣' for c in text) or text=='[English](../index.ipynb)', i

def test_a_comment_that_is_not_there_is_named():
    assert korean.with_comments('f()   # one', 'one → 하나') == 'f()   # 하나'
    with pytest.raises(ValueError, match='no comment "# two"'): korean.with_comments('f()   # one', 'two → 둘')
