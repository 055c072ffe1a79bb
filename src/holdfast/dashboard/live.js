"use strict";
// Request the page every two seconds, and show it if it has changed.
let known = null;
async function refresh() {
  if (!document.hidden) {
    try {
      const headers = known ? {"If-None-Match": known} : {};
      const answer = await fetch(location.pathname, {headers, cache: "no-store"});
      if (answer.status === 200) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        document.querySelector("main").replaceWith(page.querySelector("main"));
        document.title = page.title;
        known = answer.headers.get("ETag");
      }
      document.body.classList.toggle("lost", answer.status >= 400);
    } catch {
      document.body.classList.add("lost");
    }
  }
  setTimeout(refresh, 2000);
}
setTimeout(refresh, 2000);
