"use strict";
(() => {
const $ = id => document.getElementById(id);
const D = JSON.parse($("data").textContent);
const [L, H, N] = D.shape, row = (N + 7) >> 3;
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const floats = text => text && new Float32Array(bytes(text).buffer);
const held = bytes(D.held), rank = D.rank && bytes(D.rank);
const attended = floats(D.attended), lost = floats(D.lost), lostByHead = floats(D.lostByHead);
const holds = (head, t) => held[head * row + (t >> 3)] >> (t & 7) & 1;
const percent = (x, digits = 0) => (100 * x).toFixed(digits) + "%";
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name);

// Cells of each head, and where its ranks begin.
const cells = new Uint32Array(L * H), start = new Uint32Array(L * H + 1);
for (let h = 0; h < L * H; h++) {
  for (let t = 0; t < N; t++) cells[h] += holds(h, t);
  start[h + 1] = start[h] + cells[h];
}

// The text, as one element per token in paragraphs that a browser can skip.
const spans = [];
let part;
for (let t = 0; t < N; t++) {
  if (t % 512 === 0) $("text").append(part = document.createElement("p"));
  const span = document.createElement("i");
  span.textContent = D.pieces[t];
  span.dataset.t = t;
  spans.push(span);
  part.append(span);
}

// ---- which heads, and how they colour the text -------------------------------------------------

let layer = -1, head = -1, mode = "held", colours = new Uint8Array(N);
const chosen = () => {
  const found = [];
  for (let l = 0; l < L; l++) for (let h = 0; h < H; h++)
    if ((layer < 0 || l === layer) && (head < 0 || h === head)) found.push(l * H + h);
  return found;
};
const level = share => {
  if (share <= 0) return 0;
  let n = 1;
  while (n <= D.edges.length && share + 5e-7 >= D.edges[n - 1]) n++;
  return n;
};

function paint() {
  const heads = chosen();
  if (mode === "held") {
    const n = new Uint16Array(N);
    for (const h of heads) for (let t = 0; t < N; t++) n[t] += holds(h, t);
    for (let t = 0; t < N; t++) colours[t] = level(n[t] / heads.length);
  } else {
    // By order, not size: a few tokens take most of the attention.
    const values = mode === "lost" ? lost : attended;
    const most = values.reduce((a, b) => Math.max(a, b), 0);
    for (let t = 0; t < N; t++) {
      const x = most > 0 ? values[t] / most : 0;
      colours[t] = x > 0 ? Math.max(0, Math.min(8, Math.round(8 + 2 * Math.log2(x)))) : 0;
    }
  }
  for (let t = 0; t < N; t++) spans[t].className = "h" + colours[t];
  $("legend").hidden = mode !== "held";
  const mean = heads.reduce((sum, h) => sum + cells[h], 0) / heads.length;
  const count = heads.length === 1 ? "1 head" : heads.length + " heads";
  $("chosen").textContent = mode === "held"
    ? `${count}: ${Math.round(mean).toLocaleString("en")} cells, ${percent(mean / N, 1)} of the tokens`
    : "all heads; a step of colour is a factor of 1.4, from the most to a sixteenth of it";
  $("layer").disabled = $("head").disabled = mode !== "held";
  document.querySelectorAll(".heads button").forEach(b =>
    b.setAttribute("aria-pressed", layer >= 0 && head >= 0 && +b.dataset.h === layer * H + head));
  drawMap();
}

function drawMap() {
  const canvas = $("map"), width = canvas.width = canvas.clientWidth || 300, pen = canvas.getContext("2d");
  const shades = [...Array(9)].map((_, i) => i ? style("--h" + i) : style("--tint"));
  for (let x = 0; x < width; x++) {
    const a = Math.floor(x * N / width), b = Math.max(a + 1, Math.floor((x + 1) * N / width));
    let sum = 0;
    for (let t = a; t < b; t++) sum = mode === "held" ? sum + colours[t] : Math.max(sum, colours[t] * (b - a));
    pen.fillStyle = shades[Math.round(sum / (b - a))];
    pen.fillRect(x, 0, 1, canvas.height);
  }
}

function choose(l, h) {
  if (layer === l && head === h) l = h = -1;
  layer = l; head = h; mode = "held";
  $("layer").value = l; $("head").value = h; $("mode").value = mode;
  paint();
  $("bar").scrollIntoView({ block: "nearest" });
}

function grid(id, value, say) {
  const box = $(id);
  if (!box) return;
  box.style.gridTemplateColumns = `auto repeat(${L}, minmax(9px, 3rem))`;
  const most = Math.max(...value) || 1;
  for (let h = 0; h < H; h++) {
    box.append(label("head " + (h + 1), "row"));
    for (let l = 0; l < L; l++) {
      const button = document.createElement("button"), i = l * H + h;
      button.type = "button";
      button.dataset.h = i;
      button.style.setProperty("--v", value[i] / most);
      button.title = `layer ${l + 1}, head ${h + 1}: ${say(i)}`;
      button.setAttribute("aria-label", button.title);
      button.onclick = () => choose(l, h);
      box.append(button);
    }
  }
  box.append(label("layer", "row"));
  for (let l = 1; l <= L; l++) box.append(label(l === 1 || l % 5 === 0 ? l : "", ""));
}
function label(text, kind) {
  const span = document.createElement("span");
  span.textContent = text;
  span.className = kind;
  return span;
}

// ---- what is known of a token ------------------------------------------------------------------

function sourceOf(t) {
  let a = 0, b = D.sources.length;
  while (b - a > 1) { const m = (a + b) >> 1; if (D.sources[m][0] <= t) a = m; else b = m; }
  return D.names[D.sources[a][1]] || "no document";
}

function rankOf(h, t) {
  let n = start[h];
  for (let i = 0; i < t; i++) n += holds(h, i);
  return rank[n];
}

function tell(t, x, y) {
  const tip = $("tip"), all = [...Array(L * H).keys()].filter(h => holds(h, t));
  const lines = [[`token ${t.toLocaleString("en")}`], [sourceOf(t)], [`held by ${all.length} of ${L * H} heads`]];
  const heads = chosen();
  if (heads.length < L * H)
    lines.push([`of those chosen: ${heads.filter(h => holds(h, t)).length} of ${heads.length}`]);
  const ranked = rank ? heads.filter(h => holds(h, t)) : [];
  if (ranked.length)
    lines.push([`relevance: above ${Math.round(ranked.reduce((s, h) => s + rankOf(h, t), 0) / ranked.length)}% of the cells of these heads`]);
  const total = attended ? attended.reduce((a, b) => a + b, 0) || 1 : 1;
  if (attended) lines.push([`attended by the question: ${percent(attended[t] / total, 2)}` + (lost ? `, lost: ${percent(lost[t] / total, 2)}` : "")]);
  const word = document.createElement("b");
  word.textContent = JSON.stringify(D.pieces[t]);
  tip.replaceChildren(word, ...lines.map(([text]) => { const div = document.createElement("div"); div.textContent = text; return div; }));
  const size = Math.max(3, Math.min(8, Math.floor(300 / L))), canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  canvas.width = L * size; canvas.height = H * size;
  pen.fillStyle = style("--tint"); pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = style("--accent");
  for (const h of all) pen.fillRect(Math.floor(h / H) * size, h % H * size, size - 1, size - 1);
  tip.append(canvas);
  tip.hidden = false;
  const w = tip.offsetWidth, k = tip.offsetHeight;
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - w - 4)) + "px";
  tip.style.top = (y + 18 + k > innerHeight ? Math.max(4, y - k - 10) : y + 18) + "px";
}

function go(first, last) {
  document.querySelectorAll("#text .found").forEach(span => span.classList.remove("found"));
  for (let t = first; t <= last; t++) spans[t].classList.add("found");
  spans[first].scrollIntoView({ block: "center" });
}

// ---- events ------------------------------------------------------------------------------------

const pointed = event => event.target.dataset && event.target.dataset.t;
$("text").addEventListener("pointermove", event => {
  const t = pointed(event);
  if (t !== undefined) tell(+t, event.clientX, event.clientY); else $("tip").hidden = true;
});
$("text").addEventListener("pointerleave", () => { $("tip").hidden = true; });
$("text").addEventListener("click", event => {
  const t = pointed(event);
  if (t !== undefined) tell(+t, event.clientX, event.clientY);
});
addEventListener("scroll", () => { $("tip").hidden = true; }, { passive: true, capture: true });
addEventListener("keydown", event => { if (event.key === "Escape") $("tip").hidden = true; });
addEventListener("resize", drawMap);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
$("map").onclick = event => {
  const box = $("map").getBoundingClientRect();
  const t = Math.min(N - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * N)));
  go(t, t);
};
for (const id of ["mode", "layer", "head"]) $(id).onchange = () => {
  mode = $("mode").value; layer = +$("layer").value; head = +$("head").value;
  paint();
};
document.querySelectorAll("button.go").forEach(b => { b.onclick = () => go(+b.dataset.first, +b.dataset.last); });
// From the address: #layer=3&head=1&mode=lost&token=120, to point somebody at something.
const asked = new URLSearchParams(location.hash.slice(1));
for (const id of ["mode", "layer", "head"]) if (asked.has(id)) {
  const value = id === "mode" ? asked.get(id) : String(asked.get(id) - 1);
  if ([...$(id).options].some(option => option.value === value)) $(id).value = value;
}
mode = $("mode").value; layer = +$("layer").value; head = +$("head").value;
grid("cells", cells, i => `${cells[i].toLocaleString("en")} cells, ${percent(cells[i] / N, 1)}`);
if (lostByHead) grid("lost", lostByHead, i => `${percent(lostByHead[i], 1)} lost`);
paint();
const token = Number(asked.get("token"));
if (asked.has("token") && Number.isInteger(token) && token >= 0 && token < N) go(token, token);
})();
