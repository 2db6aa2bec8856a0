// Sphinx makes no summary of a result whose anchor is empty, as that of an index entry, and then appends it.
// Such a result shows its page's text instead.
if (typeof Search !== "undefined") {
  const summary = Search.makeSearchSummary;
  Search.makeSearchSummary = (html, words, anchor) => summary(html, words, anchor) ?? summary(html, words, "");
}
