"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const make = (tag, kind, said) => {
  const it = document.createElement(tag);
  if (kind) it.className = kind;
  if (said !== undefined) it.textContent = said;
  return it;
};
const colour = (j) => "k" + (j % 20);

// tables: sort by a column, keep the rows that hold a word
for (const table of document.querySelectorAll("table.sort")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
    const head = button.closest("th"), at = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const th of head.parentNode.cells) th.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[at].dataset.v ?? row.cells[at].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b), d = x - y;
      return (Number.isNaN(d) ? x.localeCompare(y) : d) * (up ? 1 : -1);
    });
    body.append(...rows);
  }));
}
for (const input of document.querySelectorAll("input[data-for]")) {
  const body = document.getElementById(input.dataset.for).tBodies[0];
  input.addEventListener("input", () => {
    const word = input.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(word);
  });
}

// the group browser
const list = document.getElementById("groups");
if (!list) return;
const all = data.groups, STEP = 25;
const order = document.getElementById("order"), word = document.getElementById("word");
const more = document.getElementById("more"), count = document.getElementById("count");
let shown = STEP, wanted = [];
const texts = (g) => [g.question, g.group, ...(g.members || []).map((m) => (m.text || "") + " " + m.id)].join("\n").toLowerCase();
const found = all.map(texts);
const by = {
  hard: (a, b) => b.posterior - a.posterior, easy: (a, b) => a.posterior - b.posterior,
  gain: (a, b) => (b.raw - b.posterior) - (a.raw - a.posterior),
  cost: (a, b) => (a.raw - a.posterior) - (b.raw - b.posterior),
};
function choose() {
  const said = word.value.toLowerCase();
  wanted = all.map((g, i) => [g, i]).filter(([, i]) => !said || found[i].includes(said));
  wanted.sort((a, b) => by[order.value](a[0], b[0]) || a[1] - b[1]);
  draw();
}
function draw() {
  list.replaceChildren(...wanted.slice(0, shown).flatMap(([g, i]) => line(g, i)));
  more.hidden = shown >= wanted.length;
  count.textContent = Math.min(shown, wanted.length) + " of " + wanted.length + " groups" +
    (data.total > all.length ? " (of " + data.total + "; the hardest)" : "");
}
function line(g, i) {
  const row = make("tr"), cell = make("td", "any q"), open = make("button", "open", g.question || g.group);
  open.dir = "auto";
  open.dataset.group = i;
  open.setAttribute("aria-expanded", "false");
  cell.append(open);
  row.append(cell);
  for (const value of [g.raw, g.posterior, g.raw - g.posterior]) row.append(make("td", "n", value.toFixed(3)));
  row.append(make("td", "n", g.fold));
  const below = make("tr"), wide = make("td");
  wide.colSpan = 5;
  below.hidden = true;
  below.append(wide);
  open.addEventListener("click", () => {
    const now = below.hidden;
    if (now && !wide.firstChild) wide.append(detail(g));
    below.hidden = !now;
    open.setAttribute("aria-expanded", String(now));
  });
  return [row, below];
}
function matrix(g, which, title) {
  const box = make("div", "wide"), table = make("table", "mx"), head = make("tr");
  head.append(make("th", "", "row"));
  data.classes.forEach((name, j) => {
    const th = make("th", colour(j));
    th.append(make("span", "k chip", data.heads[j]));
    th.title = name;
    head.append(th);
  });
  table.append(make("caption", "over", title), head);
  g.members.forEach((m) => {
    const row = make("tr");
    row.append(make("td", "any", m.id));
    m[which].forEach((p, j) => {
      const cell = make("td", "p " + colour(j) + (j === m.label ? " true" : ""));
      cell.style.setProperty("--a", (0.05 + 0.5 * p / 1000).toFixed(3));
      cell.append(make("span", "", (p / 10).toFixed(p > 0 && p < 10 ? 1 : 0)));
      row.append(cell);
    });
    table.append(row);
  });
  box.append(table);
  return box;
}
function top(p) { return p.indexOf(Math.max(...p)); }
function chip(j) { return make("span", "k chip " + colour(j), data.classes[j]); }
function detail(g) {
  const box = make("div", "detail");
  if (!g.members) {
    box.append(make("p", "why", "This page has no room for the rows of this group; report.json of a smaller run, or stackllm compare, tells them."));
    return box;
  }
  const two = make("div", "two");
  two.append(matrix(g, "before", "row by row, %"), matrix(g, "after", "given the group, %"));
  box.append(two);
  for (const m of g.members) {
    const head = make("h3", "any");
    head.append(make("span", "", "row " + m.id + ": "), chip(m.label));
    const before = top(m.before), after = top(m.after);
    const told = after === m.label ? (before === m.label ? "right" : "right once the group is known")
      : before === m.label ? "right row by row only" : "wrong";
    head.append(make("span", "tag", told));
    if (after !== m.label) head.append(" taken for ", chip(after));
    box.append(head);
    if (m.text === undefined) continue;
    const p = make("p", "resp " + colour(m.label));
    p.dir = "auto";
    const letters = [...m.text];  // places count letters, not halves of pairs
    const part = (from, to) => letters.slice(from, to).join("");
    let at = 0;
    for (const [start, end, j, strength] of m.marks) {
      p.append(part(at, start));
      const mark = make("mark", colour(j) + " s" + strength, part(start, end));
      mark.title = "speaks for " + data.classes[j];
      p.append(mark);
      at = end;
    }
    p.append(part(at));
    p.tabIndex = 0;
    box.append(p);
    if (m.length > letters.length) box.append(make("p", "why", "cut: " + m.length.toLocaleString("en") + " characters in all"));
  }
  return box;
}
order.addEventListener("change", choose);
word.addEventListener("input", () => { shown = STEP; choose(); });
more.addEventListener("click", () => { shown += STEP; draw(); });
for (const dot of document.querySelectorAll("[data-g]")) dot.addEventListener("click", () => {
  word.value = "";
  order.value = "hard";
  const i = Number(dot.dataset.g);
  shown = Math.max(shown, i + 1);
  choose();
  const open = list.querySelector('[data-group="' + i + '"]');
  if (open.getAttribute("aria-expanded") === "false") open.click();
  open.focus();
  open.scrollIntoView({ block: "center" });
});
choose();
const first = list.querySelector("button");
if (first) first.click();
})();
