"Configure Sphinx for the pages that `stage` writes. build.py runs it"
import ast, re, sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

sys.path.insert(0, str(Path(__file__).parent))
import api, links, stage

project = stage.settings['lib_name']
author = stage.settings['author']
version = release = stage.settings['version']
copyright = author
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.linkcode' if stage.git_url else 'sphinx.ext.viewcode']
exclude_patterns = ['files/*']
language = 'en'
highlight_language = 'python3'
pygments_style = 'default'

# Show notebooks as they are stored, in their own Markdown
nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_merge_streams = True
nb_render_image_options = {'align': 'left'}
nb_ipywidgets_js = {}
myst_enable_extensions = ['dollarmath', 'colon_fence', 'attrs_block', 'attrs_inline', 'deflist']
myst_heading_anchors = 4
myst_links_external_new_tab = False

# Python objects
add_module_names = False
python_display_short_literal_types = True
python_maximum_signature_line_length = 70
toc_object_entries_show_parents = 'hide'
viewcode_line_numbers = False
python_use_unqualified_type_names = True
modindex_common_prefix = ['fastai_multi.']

html_theme = 'pydata_sphinx_theme'
html_title = project
html_static_path = [str(Path(__file__).parent/'static')]
templates_path = [str(Path(__file__).parent/'templates')]
html_css_files = ['site.css']
html_js_files = [('search.js', {'defer': 'defer'})]
html_favicon = str(Path(__file__).parent/'static'/'mark.svg')
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {'index': [], 'measured': [], 'contributing': [], 'changelog': [], 'search': [], 'genindex': [],
                 'ko/index': []}
html_context = dict(default_mode='auto')
html_theme_options = dict(logo=dict(text=project, image_light='_static/mark.svg', image_dark='_static/mark.svg',
                                    alt_text=''),
                          navbar_align='left', header_links_before_dropdown=6, show_prev_next=True, show_toc_level=2,
                          navigation_with_keys=False, back_to_top_button=False,
                          secondary_sidebar_items={'**': ['page-toc'], 'index': ['page-toc'], 'tutorials': [],
                                                   'api': []},
                          footer_start=['copyright'], footer_end=[], pygments_light_style='a11y-high-contrast-light',
                          pygments_dark_style='github-dark',
                          **(dict(github_url=stage.git_url) if 'github.com' in stage.git_url else {}))
copybutton_selector = 'div.cell_input pre, div.highlight-python pre, div.highlight-sh pre, div.highlight-bash pre'

def tags(module):
    "The source lines of each name in a module, including methods under `@patch`"
    return {n: ('class' if isinstance(o, ast.ClassDef) else 'def', api.first_line(o), o.end_lineno)
            for n,o in api.nodes(module).items()}

def linkcode_resolve(domain, info):
    if domain!='py' or info['fullname'] not in (t := tags(info['module'])): return None
    _,a,b = t[info['fullname']]
    return stage.at_git(f'{api.module_file(info["module"]).relative_to(stage.root).as_posix()}#L{a}-L{b}')

def viewcode_source(app, module): return api.source(module),tags(module)

# Names

def own_names(env):
    "The page and the anchor for every way to write a name of this package"
    d = {}
    for full,o in sorted(env.get_domain('py').objects.items()):
        parts = full.split('.')
        for i in range(len(parts)): d.setdefault('.'.join(parts[i:]), set()).add((o.docname, o.node_id, o.objtype))
    found = {}
    for n,os in d.items():
        # a method name alone, such as `show`, is ambiguous
        tops = ({o for o in os if o[2] in ('function','class','data')} if '.' not in n
                else {o for o in os if o[2]!='module'})
        if len(tops)==1: found[n] = next(iter(tops))[:2]
    return found

def address(app, name, docname):
    "The address of a name, and whether it belongs to this package"
    if not hasattr(app.env, 'own_names_'): app.env.own_names_ = own_names(app.env)
    first,_,rest = name.partition('.')
    # `learn.fit` is a method of `MultiLearner`
    if first in links.VARIABLES and rest: name = f'{links.VARIABLES[first]}.{rest}'
    names = [name]
    if first in links.VARIABLES: names.append(f'Multi{name}')
    if '.' not in name: names += [f'{c}.{name}' for c in links.METHODS_OF]
    for n in names:
        if own := app.env.own_names_.get(n): return app.builder.get_relative_uri(docname, own[0])+f'#{own[1]}',True
    return links.elsewhere(name),False

class LinkNames(SphinxPostTransform):
    "Link each `name` in code type that this package, fastai or another library documents, once per section"
    default_priority = 20
    def run(self):
        seen = {}
        for lit in list(self.document.findall(nodes.literal)):
            if any(self.within(lit, t)
                   for t in (nodes.reference, addnodes.pending_xref, nodes.title, addnodes.desc_signature)):
                continue
            name = re.sub(r'\(.*\)$', '', lit.astext(), flags=re.S)
            if not re.fullmatch(r'[A-Za-z_]\w*(\.\w+)*', name): continue
            uri,ours = address(self.app, name, self.env.docname)
            section = self.section(lit)
            if not uri or (id(section), name) in seen or self.is_about(lit, name): continue
            seen[id(section), name] = True
            ref = nodes.reference('', '', internal=ours, refuri=uri, classes=['name'])
            lit.replace_self(ref)
            ref += lit
    def within(self, n, cls):
        while n := n.parent:
            if isinstance(n, cls): return n
    def section(self, n): return self.within(n, (addnodes.desc,nodes.section))
    def is_about(self, n, name):
        "Whether a name is in its own description, or a parameter in the first column of its table"
        entry = self.within(n, nodes.entry)
        if self.within(n, addnodes.desc) and entry is not None and entry.parent.index(entry)==0: return True
        while d := self.within(n, addnodes.desc):
            if any(s.get('fullname')==name for s in d.findall(addnodes.desc_signature)): return True
            n = d
        return False

def missing_reference(app, env, node, content):
    "Resolve the short names of types in signatures"
    if node.get('refdomain')!='py': return None
    uri,ours = address(app, node['reftarget'], node.get('refdoc', env.docname))
    if not uri: return None
    ref = nodes.reference('', '', internal=ours, refuri=uri)
    ref += content
    return ref

# Write formulas as MathML, which browsers draw themselves: this needs no script and no download.

def mathml(self, node, display):
    from latex2mathml.converter import convert
    tag = ('div','class="formula"') if display else ('span','class="formula"')
    formula = convert(node.astext(), display="block" if display else "inline")
    self.body.append(f'<{tag[0]} {tag[1]}>{formula}</{tag[0]}>')
    raise nodes.SkipNode

# Languages

def in_its_language(app, page, template, context, doctree):
    "Mark the language of a page, and link to the page in the other language"
    name = page.removeprefix('ko/')
    if f'ko/{name}' not in app.env.found_docs: return
    if page!=name: context['language'] = 'ko'
    for lang,other in (('en', name), ('ko', f'ko/{name}')):
        address = app.builder.get_relative_uri(page, other) or '#'
        context['metatags'] += f'<link rel="alternate" hreflang="{lang}" href="{address}" />\n'

def setup(app):
    app.add_post_transform(LinkNames)
    app.connect('html-page-context', in_its_language)
    app.connect('missing-reference', missing_reference)
    if not stage.git_url: app.connect('viewcode-find-source', viewcode_source)
    app.add_html_math_renderer('mathml', inline_renderers=(lambda s, n: mathml(s, n, False), None),
                               block_renderers=(lambda s, n: mathml(s, n, True), None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)

html_math_renderer = 'mathml'
