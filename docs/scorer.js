// Sphinx's search: what is in a page's title comes first, and an exact title before all; a page found is shown with its subtitle.
var Scorer = {
  score: (result) => {
    const [page, , anchor, description, score] = result;
    if (!anchor && !description) result[3] = SUBTITLES[page] || null;
    return score;
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 100, partialTitle: 7, term: 5, partialTerm: 2,
};
