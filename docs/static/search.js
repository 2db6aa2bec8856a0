// A result whose anchor holds no text, as an index entry's, has no summary: Sphinx's script would append null
document.addEventListener('DOMContentLoaded', () => {
  if (typeof Search === 'undefined') return;
  const summary = Search.makeSearchSummary;
  Search.makeSearchSummary = (...args) => summary(...args) ?? document.createTextNode('');
});
