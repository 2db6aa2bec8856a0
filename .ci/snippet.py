"""Run the Python code of README.md in the current folder, as if someone pasted it.
Usage: python .ci/snippet.py README.md"""
import re, sys
from pathlib import Path

blocks = re.findall(r'^```python\n(.*?)^```', Path(sys.argv[1]).read_text(encoding='utf-8'), re.S|re.M)
if not blocks: sys.exit(f'{sys.argv[1]} holds no Python')
code = '\n'.join(blocks)
exec(compile(code, sys.argv[1], 'exec'), {'__name__': '__main__'})
print(f'{len(blocks)} blocks, {len(code.splitlines())} lines of {sys.argv[1]} ran')
