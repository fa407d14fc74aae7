
// A link to what is folded away unfolds it, and takes the keyboard along.
function reveal(hash) {
  const target = document.getElementById(hash.slice(1));
  if (!target) return;
  for (let at = target.closest("details"); at; at = at.parentElement.closest("details")) at.open = true;
  target.scrollIntoView();
  target.querySelector("summary, a")?.focus({ preventScroll: true });
}

window.addEventListener("hashchange", () => reveal(location.hash));
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (link?.hash === location.hash) reveal(link.hash); // no change of the hash, and so no event of that
});
reveal(location.hash);
