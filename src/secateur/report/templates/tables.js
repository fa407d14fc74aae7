// Makes tables with data-sortable sortable, and long tables with data-filterable filterable.
const minFilterRows = 8;

function makeSortable(table) {
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
      heads.forEach((column) => column.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      // Missing values stay at the end in both directions.
      rows.sort((a, b) => {
        const [x, y] = [key(a, index), key(b, index)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return descending ? -compare(x, y) : compare(x, y);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

function makeFilterable(table) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < minFilterRows) return;
  const label = document.createElement("label");
  const input = document.createElement("input");
  const status = document.createElement("output");
  label.className = "filter";
  input.type = "search";
  input.placeholder = "Filter rows";
  input.setAttribute("aria-label", "Filter rows");
  label.append(input, " ", status);
  table.closest(".scroll").before(label);
  const texts = new Map(rows.map((row) => [row, row.textContent.replace(/\s+/g, " ").toLowerCase()]));
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const [row, text] of texts) row.hidden = !words.every((word) => text.includes(word));
    status.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
  });
}

document.querySelectorAll("table[data-sortable]").forEach(makeSortable);
document.querySelectorAll("table[data-filterable]").forEach(makeFilterable);
