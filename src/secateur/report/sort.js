// Makes the columns of tables marked data-sortable sortable. The page is whole without it.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const key = (row, index) => row.cells[index].dataset.value ?? row.cells[index].textContent.trim();
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      // What was not measured stays at the end, whichever way the rest is sorted.
      rows.sort((a, b) => {
        const [x, y] = [key(a, index), key(b, index)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return descending ? -compare(x, y) : compare(x, y);
      });
      table.tBodies[0].append(...rows);
    });
  });
}
