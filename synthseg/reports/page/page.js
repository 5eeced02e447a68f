
"use strict";
(() => {
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

  // -------------------------------------------------------------------------- what a page of any size has

  const theme = $("#theme");
  theme.addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme
      ? document.documentElement.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });

  function showToggles() {
    const bare = document.body.classList.contains("bare");
    for (const toggle of $$(".toggle")) {
      toggle.setAttribute("aria-pressed", String(!bare));
      toggle.hidden = false;
    }
    for (const keys of $$(".keys")) keys.hidden = false;
  }
  function toggleOutlines() {
    document.body.classList.toggle("bare");
    showToggles();
  }
  document.addEventListener("click", (event) => event.target.closest(".toggle") && toggleOutlines());
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "o" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) toggleOutlines();
  });
  theme.hidden = false;
  showToggles();
  if (!$("#table")) return; // one scan: its details are all there is

  // ------------------------------------------------------------------------------------- many scans
  const data = JSON.parse($("#numbers").textContent);
  const table = $("#table");
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const structures = headings.filter((heading) => heading.dataset.structure !== undefined);
  const firstVolume = structures.length ? structures[0].cellIndex : 0;
  const numberOf = (row) => Number(row.dataset.number);
  let unit = "hard";
  let state = "";

  // ------------------------------------------------------------------------------------------ numbers

  function volume(number, structure) {
    const entry = data.scans[number];
    if (unit !== "percent") return entry[unit][structure];
    const whole = entry.hard[data.intracranial];
    const part = entry.hard[structure];
    return whole > 0 && part !== null ? (100 * part) / whole : null;
  }

  function text(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    return value.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0);
  }

  function showUnit() {
    for (const row of rows) {
      structures.forEach((heading, structure) => {
        row.cells[firstVolume + structure].textContent = text(volume(numberOf(row), structure));
      });
    }
    for (const heading of structures) $(".unit", heading).textContent = unit === "percent" ? "%" : "ml";
  }

  // ------------------------------------------------------------------------------------------ sorting

  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  function valueOf(row, heading) {
    if (heading.dataset.structure !== undefined) return volume(numberOf(row), Number(heading.dataset.structure));
    const cell = row.cells[heading.cellIndex];
    if (cell.dataset.v !== undefined) return cell.dataset.v === "" ? null : Number(cell.dataset.v);
    return cell.textContent.trim() || null;
  }

  function sortBy(heading, descending) {
    const sign = descending ? -1 : 1;
    const keyed = rows.map((row) => [valueOf(row, heading), row]);
    keyed.sort(([a, first], [b, second]) => {
      if (a === null || b === null) return (a === null) - (b === null) || numberOf(first) - numberOf(second);
      const order = typeof a === "number" ? a - b : collator.compare(a, b);
      return sign * order || numberOf(first) - numberOf(second);
    });
    for (const other of headings) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...keyed.map(([, row]) => row));
  }

  for (const heading of headings) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sortBy(heading, heading.getAttribute("aria-sort") === "ascending"));
  }

  function sortAgain() {
    const sorted = headings.find((heading) => heading.hasAttribute("aria-sort"));
    if (sorted) sortBy(sorted, sorted.getAttribute("aria-sort") === "descending");
  }

  // ---------------------------------------------------------------------------------------- filtering

  const plainName = (name) => name.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
  const comparisons = {
    "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
  };

  // "Hippocampus<5", "dice<0.8", "time>60": a test of a number; anything else is looked for in names and flags.
  function testOf(word) {
    const match = /^(.+?)(<=|>=|<|>|=)(-?[\d.]+)$/u.exec(word);
    if (match) {
      const wanted = plainName(match[1]);
      const named = (heading) => (data.structures[heading.dataset.structure] ?? heading.textContent);
      const numeric = headings.filter((heading) => heading.dataset.kind === "number");
      const heading = numeric.find((each) => plainName(named(each)) === wanted)
        ?? numeric.find((each) => plainName(named(each)).includes(wanted));
      const limit = Number(match[3]);
      if (heading && Number.isFinite(limit)) {
        return (row) => {
          const value = valueOf(row, heading);
          return value !== null && comparisons[match[2]](value, limit);
        };
      }
    }
    const wanted = word.toLowerCase();
    return (row) => row.searched.includes(wanted);
  }

  for (const row of rows) {
    const number = numberOf(row);
    row.searched = `${data.names[number]} ${$(".flags", row).textContent}`.toLowerCase();
  }

  function filter() {
    const tests = $("#query").value.trim().replace(/\s*(<=|>=|<|>|=)\s*/gu, "$1").split(/\s+/u).filter(Boolean).map(testOf);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !((!state || row.dataset.state === state) && tests.every((test) => test(row)));
      shown += !row.hidden;
    }
    $("#count").textContent = shown === rows.length ? "" : `${shown} of ${rows.length}`;
    $("#nothing").hidden = shown > 0 || rows.length === 0;
  }

  function press(buttons, pressed) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === pressed));
  }

  $("#tools").addEventListener("submit", (event) => event.preventDefault());
  $("#query").addEventListener("input", filter);
  $("#unit").addEventListener("change", (event) => {
    unit = event.target.value;
    showUnit();
    sortAgain();
    filter();
  });
  const states = $$("[data-state]", $("#tools"));
  for (const button of states) {
    button.addEventListener("click", () => {
      state = button.dataset.state;
      press(states, button);
      filter();
    });
  }
  const views = $$("[data-view]");
  for (const button of views) {
    button.addEventListener("click", () => {
      table.classList.toggle("gallery", button.dataset.view === "gallery");
      press(views, button);
    });
  }

  // ---------------------------------------------------------------------------- the reader's own verdicts
  // Kept by the browser, for this file; a verdict on a result that has changed since is left out.

  const store = `synthseg-report:${location.pathname}`;
  const fingerprint = (number) => JSON.stringify(data.scans[number].hard);
  const verdicts = Object.create(null);
  try {
    Object.assign(verdicts, JSON.parse(localStorage.getItem(store) || "{}"));
  } catch { /* no storage: verdicts last as long as the page */ }
  for (const [number, name] of data.names.entries()) {
    if (verdicts[name] && verdicts[name].of !== fingerprint(number)) delete verdicts[name];
  }
  const verdictOf = (number) => verdicts[data.names[number]] || { verdict: "", note: "" };

  function judge(number, change) {
    const verdict = { ...verdictOf(number), ...change, of: fingerprint(number) };
    if (verdict.verdict || verdict.note) verdicts[data.names[number]] = verdict;
    else delete verdicts[data.names[number]];
    try {
      localStorage.setItem(store, JSON.stringify(verdicts));
    } catch { /* as above */ }
    showVerdicts();
  }

  function showVerdicts() {
    const signs = { good: "✓ good", unsure: "? unsure", bad: "✗ bad" };
    for (const row of rows) {
      const { verdict, note } = verdictOf(numberOf(row));
      const mine = $(".mine", row);
      mine.textContent = signs[verdict] || (note ? "✎" : "");
      mine.title = note;
    }
    $("#save").hidden = data.names.every((name) => !verdicts[name]);
  }

  $("#save").addEventListener("click", () => {
    const lines = [["scan", "verdict", "note"]];
    for (const [number, name] of data.names.entries()) {
      const { verdict, note } = verdictOf(number);
      lines.push([name, verdict || "n/a", note || "n/a"].map((field) => field.replace(/\s/gu, " ")));
    }
    const file = new Blob([lines.map((line) => line.join("\t") + "\n").join("")], { type: "text/tab-separated-values" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = "verdicts.tsv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });

  // ----------------------------------------------------------------------------------- one scan, enlarged

  const viewer = document.createElement("dialog");
  const bar = document.createElement("div");
  bar.className = "bar";
  const content = document.createElement("div");
  content.className = "body";
  content.tabIndex = -1;
  viewer.append(bar, content);
  document.body.append(viewer);
  let current = null;

  function tool(label, title, action, name = "") {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.title = title;
    button.className = name;
    button.addEventListener("click", action);
    bar.append(button);
    return button;
  }

  tool("‹", "the scan before (left arrow)", () => step(-1), "back").setAttribute("aria-label", "the scan before");
  const place = document.createElement("span");
  place.className = "place";
  bar.append(place);
  tool("›", "the next scan (right arrow)", () => step(1), "next").setAttribute("aria-label", "the next scan");
  const choices = ["good", "unsure", "bad"].map((verdict, index) =>
    tool(verdict, `your verdict (${index + 1}); once more takes it back`, () => give(verdict), verdict));
  const note = document.createElement("input");
  note.placeholder = "your note";
  note.setAttribute("aria-label", "your note on this scan");
  note.maxLength = 500;
  note.addEventListener("input", () => current !== null && judge(current, { note: note.value.trim() }));
  bar.append(note);
  tool("close", "close (Escape)", () => viewer.close(), "push");
  choices[0].classList.add("first");

  function give(verdict) {
    judge(current, { verdict: verdictOf(current).verdict === verdict ? "" : verdict });
    showChoice();
  }

  function showChoice() {
    const { verdict, note: words } = verdictOf(current);
    for (const button of choices) button.setAttribute("aria-pressed", String(button.classList.contains(verdict || "none")));
    note.value = words || "";
  }

  const shownRows = () => [...body.rows].filter((row) => !row.hidden);

  function show(number) {
    const details = document.getElementById(`scan-${number + 1}`);
    if (!details) return;
    current = number;
    content.replaceChildren(details.content.cloneNode(true)); // from a template: pictures are read when they are shown
    showToggles();
    requestAnimationFrame(() => { content.scrollTop = 0; }); // after the browser went to the anchor
    const order = shownRows();
    const at = order.findIndex((row) => numberOf(row) === number);
    place.textContent = at < 0 ? "" : `${at + 1} of ${order.length}`;
    $(".back", bar).disabled = at <= 0;
    $(".next", bar).disabled = at < 0 || at === order.length - 1;
    showChoice();
    if (!viewer.open) {
      viewer.showModal();
      content.focus({ preventScroll: true });
    }
    if (location.hash !== `#scan-${number + 1}`) history.replaceState(null, "", `#scan-${number + 1}`);
  }

  function step(by) {
    const order = shownRows();
    const at = order.findIndex((row) => numberOf(row) === current);
    if (at >= 0 && order[at + by]) show(numberOf(order[at + by]));
  }

  viewer.addEventListener("close", () => {
    content.replaceChildren();
    history.replaceState(null, "", location.pathname + location.search);
    const row = current === null ? null : $(`#row-${current}`);
    current = null;
    if (row && !row.hidden) {
      row.scrollIntoView({ block: "nearest" });
      $("a", row).focus({ preventScroll: true });
    }
  });
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("keydown", (event) => {
    if (event.target === note || event.ctrlKey || event.metaKey || event.altKey) return;
    const actions = {
      ArrowLeft: () => step(-1), ArrowRight: () => step(1),
      1: () => give("good"), 2: () => give("unsure"), 3: () => give("bad"),
    };
    if (actions[event.key]) {
      event.preventDefault();
      actions[event.key]();
    }
  });

  function openHash() {
    const match = /^#scan-(\d+)$/u.exec(location.hash);
    if (match) show(Number(match[1]) - 1);
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.open");
    const row = event.target.closest("#table tbody tr");
    if (event.ctrlKey || event.metaKey || event.shiftKey || (!link && !row)) return;
    if (!link && String(getSelection())) return; // text is being marked
    event.preventDefault();
    const number = link ? Number(/\d+$/u.exec(link.getAttribute("href"))[0]) - 1 : numberOf(row);
    show(number);
  });
  addEventListener("hashchange", openHash);

  $("#tools").hidden = false;
  showVerdicts();
  openHash();
})();
