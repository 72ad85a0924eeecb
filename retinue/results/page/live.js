// Asks the server for the runs every few seconds, and shows them if they have changed.

const LIVE_SECONDS = 3;
let tag = null;

// Shows new data; what the reader has chosen stays.
function replaceData(fresh) {
  const set = data.sets[state.set];
  const focus = document.activeElement?.dataset.sort;
  // The first runs decide how the table is sorted.
  if (!data.groups.length) state.sort = null;
  data = fresh;
  columns = new Map(data.columns.map((column) => [column.name, column]));
  state.set = Math.max(0, data.sets.indexOf(set));
  fillSets();
  fillMenus();
  update();
  showSpeed();
  showCounts();
  if (focus) document.querySelector(`[data-sort="${CSS.escape(focus)}"]`)?.focus();
}

async function follow() {
  try {
    const response = await fetch("data.json", tag ? { headers: { "If-None-Match": tag } } : {});
    if (response.status === 200) {
      tag = response.headers.get("ETag");
      const fresh = await response.json();
      if (fresh.message) $("counts").textContent = `${fresh.message}; the page waits`;
      else replaceData(fresh);
    }
  } catch {
    $("counts").textContent = "The server has ended; the page shows what it read last.";
    tag = null;
  }
  setTimeout(follow, LIVE_SECONDS * 1000);
}

follow();
