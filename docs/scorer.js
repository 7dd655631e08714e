// Sphinx's search: a page whose title holds the query comes first, the exact title before all; a page found is shown with its subtitle.
var Scorer = {
  score: (result) => {
    const [page, , anchor, description, score, , kind] = result;
    if (!anchor && !description) result[3] = SUBTITLES[page] || null;
    return kind === "title" && !anchor ? 10 * score : score;
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
