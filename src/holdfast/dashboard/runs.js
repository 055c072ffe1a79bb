"use strict";
// Request the table every two seconds. Replace only rows that have changed, so that the page keeps
// its scroll position. The sort order is in the URL, so that a bookmark keeps it.

const READ_MS = 2000;
const LOST_MS = 10000;
let known = null;

function order() {
  const [column, direction] = location.hash.slice(1).split(":");
  const head = document.querySelector(`th[data-column="${CSS.escape(column)}"]`);
  return head ? { column, descending: direction === "descending" } : null;
}

function keyOf(row, column) {
  const key = row.querySelector(`td.${column}`).dataset.key;
  return key === undefined || column === "run" ? key : Number(key);
}

function compare(one, other, descending) {
  if (one === undefined || other === undefined) {
    return (one === undefined) - (other === undefined);
  }
  const sign = descending ? -1 : 1;
  return one === other ? 0 : sign * (one < other ? -1 : 1);
}

function sort() {
  const wanted = order();
  for (const head of document.querySelectorAll("th[data-column]")) {
    const direction = wanted && wanted.descending ? "descending" : "ascending";
    const isWanted = wanted !== null && head.dataset.column === wanted.column;
    head.setAttribute("aria-sort", isWanted ? direction : "none");
  }
  const body = document.querySelector(".runs tbody");
  const rows = [...body.rows].sort((a, b) => Number(a.dataset.place) - Number(b.dataset.place));
  if (wanted !== null) {
    const { column, descending } = wanted;
    rows.sort((a, b) => compare(keyOf(a, column), keyOf(b, column), descending));
  }
  rows.forEach((row, index) => {
    if (body.rows[index] !== row) {
      body.insertBefore(row, body.rows[index]);
    }
  });
}

function showTime() {
  document.getElementById("time").textContent = new Date().toLocaleTimeString();
}

function place(body) {
  [...body.rows].forEach((row, index) => {
    row.dataset.place = index;
  });
}

function show(page) {
  const body = document.querySelector(".runs tbody");
  const rows = page.querySelector(".runs tbody");
  place(rows);
  for (const row of [...body.rows]) {
    if (!page.getElementById(row.id)) {
      row.remove();
    }
  }
  for (const row of [...rows.rows]) {
    const shown = document.getElementById(row.id);
    if (shown === null) {
      body.append(row);
    } else if (shown.outerHTML !== row.outerHTML) {
      const hadFocus = shown.contains(document.activeElement);
      shown.replaceWith(row);
      if (hadFocus) {
        row.querySelector("a").focus();
      }
    }
  }
  for (const part of ["h1", "#counts", "#hints"]) {
    document.querySelector(part).replaceWith(page.querySelector(part));
  }
  document.title = page.title;
  sort();
}

async function refresh() {
  if (!document.hidden) {
    try {
      const headers = known ? { "If-None-Match": known } : {};
      const signal = AbortSignal.timeout(LOST_MS);
      const answer = await fetch(location.pathname, { headers, signal, cache: "no-store" });
      if (answer.status === 200) {
        show(new DOMParser().parseFromString(await answer.text(), "text/html"));
        known = answer.headers.get("ETag");
      }
      document.body.classList.toggle("lost", answer.status >= 400);
      if (answer.status < 400) {
        showTime();
      }
    } catch {
      document.body.classList.add("lost");
    }
  }
  setTimeout(refresh, READ_MS);
}

document.querySelector(".runs thead").addEventListener("click", (event) => {
  const head = event.target.closest("th[data-column]");
  if (head !== null) {
    const now = head.getAttribute("aria-sort");
    const first = head.querySelector("button").dataset.first;
    const second = first === "ascending" ? "descending" : "ascending";
    // The third click restores the order of the server: the worst run first.
    const next = now === "none" ? first : now === first ? second : null;
    const hash = next === null ? "" : `#${head.dataset.column}:${next}`;
    history.replaceState(null, "", location.pathname + hash);
    sort();
  }
});
window.addEventListener("hashchange", sort);
place(document.querySelector(".runs tbody"));
sort();
showTime();
setTimeout(refresh, READ_MS);
