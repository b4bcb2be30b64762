// The page of a line. Whatever comes from outside is put into the page as text, never as HTML.
"use strict";

const byId = (id) => document.getElementById(id);
const PAUSE = 1000;
const VERDICTS = ["good", "anomalous", "invalid"];
// Dark blue over green to dark red, as the overlays of the other commands.
const COLOURS = ["30123b", "4143a7", "4771e9", "3e9bfe", "22c5e2", "1ae4b6", "46f884", "88ff4e", "b9f635", "e1dd37",
  "faba39", "fd8d27", "f05b12", "d63506", "af1801", "7a0403"].map(
  (one) => [0, 2, 4].map((i) => parseInt(one.slice(i, i + 2), 16)));

let token = "";
let state = null;
let camera = "";
let held = null; // a part that stays on the stage
let onlyBad = false;
let notice = ""; // why the last order was not taken
let drawn = { key: "", frame: null, heat: null, part: null };

function element(name, text, className) {
  const one = document.createElement(name);
  if (text !== undefined) one.textContent = text;
  if (className) one.className = className;
  return one;
}

function number(value, digits = 4) {
  return typeof value === "number" ? String(Number(value.toPrecision(digits))) : value === null ? "–" : String(value);
}

const percent = (value) => `${number(100 * value, 3)} %`;
const time = (text) => new Date(text).toLocaleTimeString("en-GB");
const kind = (result) => (VERDICTS.includes(result) ? result : "none");

async function ask(path, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (options.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  if (!answer.ok) {
    const content = await answer.json().catch(() => ({}));
    throw Object.assign(new Error(content.detail || `the line answered ${answer.status}`), { status: answer.status });
  }
  return answer;
}

// State

async function poll() {
  try {
    state = await (await ask("api/state")).json();
    banner("");
    show();
  } catch (error) {
    banner(error.status === 401 ? "This page is private: unlock it with the token below." :
      `No news from the line (${error.message}). What you see may be old.`);
    byId("ready").textContent = "no news";
    byId("ready").className = "pill bad";
    if (error.status === 401) byId("unlock").hidden = false;
  }
  setTimeout(poll, document.hidden ? 5 * PAUSE : PAUSE);
}

function banner(text) {
  byId("banner").hidden = !text;
  byId("banner").textContent = text;
}

function show() {
  const names = Object.keys(state.sources);
  if (!names.includes(camera)) camera = names[0] || "";
  byId("ready").textContent = state.ready ? "ready" : state.alive ? "not ready" : "stopped";
  byId("ready").className = state.ready ? "pill good" : "pill bad";
  byId("why").textContent = state.why;
  pairs(byId("what"), [["Bundle", state.bundle || "–"], ["Engine", state.engine || "–"], ["As of", time(state.now)]]);
  tiles();
  tabs(names);
  live();
  states();
  alarms();
  charts();
  outcomes();
  evidence();
  bundle();
}

function pairs(list, rows) {
  list.replaceChildren(...rows.map(([name, value]) => {
    const row = element("div");
    row.append(element("dt", name), element("dd", value));
    return row;
  }));
}

function tiles() {
  const counts = state.results;
  const none = Object.entries(counts).filter(([name]) => !VERDICTS.includes(name)).reduce((sum, [, n]) => sum + n, 0);
  const times = Object.values(state.monitor).map((one) => one.latency).filter((one) => one.length);
  const worst = (i) => (times.length ? `${number(1000 * Math.max(...times.map((one) => one[i])), 3)} ms` : "–");
  const tile = (name, value, className) => {
    const one = element("div", undefined, "tile");
    one.append(element("b", value, className), element("span", name));
    return one;
  };
  byId("tiles").replaceChildren(
    tile("parts", state.arrived), tile("good", counts.good || 0, "good"),
    tile("anomalous", counts.anomalous || 0, counts.anomalous ? "bad" : ""),
    tile("invalid", counts.invalid || 0, counts.invalid ? "invalid" : ""),
    tile("no result", none, none ? "none" : ""), tile("waiting", state.waiting),
    tile("p50", worst(0)), tile(`p99 of ${number(1000 * state.deadline)} ms`, worst(1)),
    tile("engine failures", state.failures, state.failures ? "bad" : ""));
}

function tabs(names) {
  byId("cameras").replaceChildren(...names.map((name) => {
    const one = element("button", name);
    one.type = "button";
    one.title = name;
    one.setAttribute("aria-pressed", String(name === camera));
    one.addEventListener("click", () => { camera = name; hold(null); show(); });
    return one;
  }));
}

// Live part

function hold(part) {
  held = part;
  byId("hold").setAttribute("aria-pressed", String(held !== null));
  byId("hold").textContent = held ? "Back to live" : "Hold this part";
}

async function live() {
  const part = held || state.live[camera] || null;
  byId("nopicture").hidden = part !== null;
  byId("canvas").hidden = part === null;
  if (!part) {
    byId("verdict").textContent = "–";
    return;
  }
  byId("verdict").textContent = part.result;
  byId("verdict").className = `verdict ${kind(part.result)}`;
  byId("part").textContent = part.part;
  byId("reason").textContent = part.reason;
  const judged = typeof part.score === "number" && typeof part.threshold === "number";
  byId("score").textContent = part.score === null ? "no score" :
    `score ${number(part.score)}, threshold ${number(part.threshold)}`;
  byId("meter").className = `meter ${kind(part.result)}`;
  byId("meter").hidden = !judged || part.threshold <= 0;
  const share = judged ? Math.max(0, Math.min(100, 50 * part.score / part.threshold)) : 0; // the threshold is the middle
  byId("meter").firstElementChild.style.width = `${share}%`;
  byId("regions").replaceChildren(...part.regions.map((one) => element("li",
    `${one.severity || "region"} at ${one.box[0]}, ${one.box[1]}: ${number(one.area, 3)} px, peak ${number(one.peak, 3)}`)));
  if (part.key === drawn.key) return;
  drawn = { key: part.key, frame: null, heat: null, part };
  try {
    const [frame, heat] = await Promise.all([picture(part.key, "frame"), part.heat ? picture(part.key, "heat") : null]);
    if (drawn.key !== part.key) return;
    drawn.frame = frame;
    drawn.heat = heat && coloured(heat);
    draw();
  } catch (error) {
    drawn.key = ""; // gone meanwhile; the next state has another one
  }
}

async function picture(key, what) {
  return createImageBitmap(await (await ask(`api/picture/${encodeURIComponent(key)}/${what}`)).blob());
}

function coloured(heat) {
  const one = document.createElement("canvas");
  one.width = heat.width;
  one.height = heat.height;
  const context = one.getContext("2d");
  context.drawImage(heat, 0, 0);
  const pixels = context.getImageData(0, 0, one.width, one.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const value = pixels.data[i] / 255;
    const colour = COLOURS[Math.round(value * (COLOURS.length - 1))];
    for (let channel = 0; channel < 3; channel += 1) pixels.data[i + channel] = colour[channel];
    pixels.data[i + 3] = Math.round(255 * value);
  }
  context.putImageData(pixels, 0, 0);
  return one;
}

function draw() {
  const { frame, heat, part } = drawn;
  if (!frame) return;
  const canvas = byId("canvas");
  const [height, width] = part.size;
  const scale = Math.max(1, 900 / Math.max(width, height)) * Math.min(1, 1800 / Math.max(width, height));
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.drawImage(frame, 0, 0, canvas.width, canvas.height);
  if (heat) {
    context.globalAlpha = byId("opacity").value / 100;
    context.imageSmoothingEnabled = true;
    context.drawImage(heat, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
  }
  for (const [colour, thickness] of [["black", 6], ["white", 2.5]]) {
    context.strokeStyle = colour;
    context.lineWidth = thickness;
    context.lineJoin = "round";
    for (const region of part.regions) {
      context.beginPath();
      region.contour.forEach(([x, y]) => context.lineTo(x * scale, y * scale));
      context.closePath();
      context.stroke();
    }
  }
}

// Lists

function states() {
  const item = (name, trouble, quiet) => {
    const one = element("li", undefined, trouble ? "off" : "");
    one.append(element("span", trouble ? `${name}: ${trouble}` : name), element("span", quiet, "quiet"));
    return one;
  };
  byId("sources").replaceChildren(...Object.entries(state.sources).map(([name, trouble]) => {
    const seen = state.monitor[name];
    return item(`camera ${name}`, trouble, seen ? `${seen.parts} parts` : "");
  }));
  byId("sinks").replaceChildren(...Object.entries(state.sinks).map(([name, one]) => {
    const left = [one.waiting && `${one.waiting} waiting`, one.missed && `${one.missed} missed`,
      one.pictures_lost && `${one.pictures_lost} without picture`].filter(Boolean);
    return item(`sink ${name}`, one.trouble, [`${one.delivered} told`, ...left].join(", "));
  }));
}

function alarms() {
  const rows = state.alarms.slice(0, 30).map((alarm) => {
    const one = element("li", undefined, alarm.over ? "over" : "");
    one.append(element("time", time(alarm.at)), element("b", `${alarm.kind}: `), element("span", alarm.text));
    return one;
  });
  byId("alarms").replaceChildren(...(rows.length ? rows : [element("li", "none", "over")]));
}

function outcomes() {
  byId("all").setAttribute("aria-pressed", String(!onlyBad));
  byId("bad").setAttribute("aria-pressed", String(onlyBad));
  byId("outcomes").replaceChildren(...(onlyBad ? state.rejected : state.last).map((part) => {
    const row = element("tr");
    const name = element("td", part.part, "name");
    if (part.reason) name.append(element("div", part.reason, "quiet"));
    row.append(element("td", time(part.arrived)), element("td", part.camera), name,
      element("td", part.result, kind(part.result)), element("td", part.action, part.action === "pass" ? "" : part.action),
      element("td", number(part.score)), element("td", number(1000 * part.seconds, 3)));
    const whole = [...state.rejected, ...Object.values(state.live)].find((one) => one.key === part.key);
    if (whole) {
      row.className = "open";
      row.title = "show this part";
      row.addEventListener("click", () => { hold(whole); live(); byId("live").scrollIntoView({ block: "nearest" }); });
    }
    return row;
  }));
}

function evidence() {
  const seen = state.monitor[camera];
  byId("learned").textContent = !seen ? "this camera's product has no calibration" : seen.learned < 1 ?
    `learning what is usual: ${percent(seen.learned)}` : "evidence of a change; a full bar is an alarm";
  byId("evidence").replaceChildren(...(seen ? Object.entries(seen.evidence) : []).map(([name, value]) => {
    const row = element("div", undefined, value >= 1 ? "test fired" : "test");
    const bar = element("div");
    const fill = element("i");
    fill.style.width = `${100 * Math.max(0, Math.min(1, 2 * value - 1))}%`; // below a half it is what chance gives
    bar.append(fill);
    const feature = seen.features[name.split(" ")[0]];
    if (feature && feature.usual !== null) row.title = `median ${number(feature.now)}, usual ${number(feature.usual)}`;
    row.append(element("span", name), bar);
    return row;
  }));
}

// Charts

function charts() {
  const seen = state.monitor[camera];
  const points = seen ? seen.points : [];
  const at = points.map((one) => Date.parse(one[0]));
  const threshold = (state.live[camera] || {}).threshold;
  chart(byId("rejects"), at, [["rejected", "main", points.map((one) => one[2] / one[1])],
    ["no verdict", "side", points.map((one) => one[3] / one[1])]],
    seen ? [["expected", "usual", seen.usual], ["tested", "limit", seen.bound]] : [], percent);
  chart(byId("scores"), at,
    [["median", "main", points.map((one) => one[4])], ["95 %", "side", points.map((one) => one[5])]],
    typeof threshold === "number" ? [["threshold", "limit", threshold]] : [], (value) => number(value, 3));
  chart(byId("latency"), at, [["longest", "main", points.map((one) => one[6])]], [["deadline", "limit", state.deadline]],
    (value) => `${number(1000 * value, 3)} ms`);
}

function shape(name, attributes, text) {
  const one = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
  if (text !== undefined) one.textContent = text;
  return one;
}

function chart(figure, at, series, limits, format) {
  const [width, height, left, bottom] = [Math.max(200, figure.clientWidth), 150, 52, 18];
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const values = series.flatMap(([, , data]) => data).filter((one) => one !== null);
  if (!values.length) {
    svg.append(shape("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing yet"));
    figure.replaceChildren(svg);
    return;
  }
  const seen = Math.max(...values);
  // A limit that is far away would press the curve flat; it is named in the key and drawn where it fits.
  const near = limits.filter(([, , value]) => value <= 6 * Math.max(seen, 1e-12));
  const top = 1.08 * Math.max(seen, ...near.map(([, , value]) => value)) || 1;
  const low = Math.min(0, ...values);
  const [from, to] = [at[0], Math.max(at[at.length - 1], at[0] + 1000 * state.seconds)];
  const x = (value) => left + (width - left - 8) * (value - from) / (to - from);
  const y = (value) => 6 + (height - bottom - 6) * (top - value) / (top - low);
  for (const value of [low, (low + top) / 2, top]) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - 8, y1: y(value), y2: y(value) }),
      shape("text", { x: left - 5, y: y(value) + 3, "text-anchor": "end" }, format(value)));
  }
  for (const [, className, value] of near) {
    svg.append(shape("line", { class: className, x1: left, x2: width - 8, y1: y(value), y2: y(value) }));
  }
  for (const [, className, data] of [...series].reverse()) {
    const known = data.map((value, i) => [at[i], value]).filter(([, value]) => value !== null);
    svg.append(shape("polyline", { class: className, points: known.map(([a, b]) => `${x(a)},${y(b)}`).join(" ") }));
    if (known.length === 1) svg.append(shape("circle", { cx: x(known[0][0]), cy: y(known[0][1]), r: 2.5 }));
  }
  svg.append(shape("text", { x: left, y: height - 4 }, time(from)),
    shape("text", { x: width - 8, y: height - 4, "text-anchor": "end" }, time(to)));
  const key = element("div", undefined, "key");
  key.append(...series.map(([name, className]) => element("span", name, className)),
    ...limits.map(([name, className, value]) => element("span", `${name} ${format(value)}`, className)));
  figure.replaceChildren(svg, key);
}

// Bundle

function bundle() {
  const now = state.activation;
  byId("note").textContent = state.note || `runs ${state.bundle || "a detector of its own"}, alpha ${number(state.alpha)}`;
  const count = now.judged ? ` – ${now.judged} of ${now.parts} parts, ${now.disagreements} judged otherwise` : "";
  byId("progress").textContent = now.state === "idle" ? "" : `${now.bundle}: ${now.state}: ${now.text}${count}`;
  byId("progress").className = now.state === "refused" ? "bad" : "";
  byId("notice").textContent = notice;
  byId("locked").hidden = state.token;
  byId("unlock").hidden = !state.token || token !== "";
  byId("activate").hidden = !state.token || token === "";
  byId("cancel").disabled = !["loading", "shadow"].includes(now.state);
}

async function order(path, body) {
  try {
    await ask(path, { method: "POST", body: JSON.stringify(body) });
    notice = "";
  } catch (error) {
    notice = error.message;
  }
  byId("notice").textContent = notice;
}

byId("unlock").addEventListener("submit", async (event) => {
  event.preventDefault();
  token = byId("token").value;
  byId("token").value = "";
  try {
    const found = await (await ask("api/bundles")).json();
    byId("bundle").replaceChildren(...found.bundles.map((name) => element("option", name)));
    byId("bundle").title = found.folder;
    byId("unlock").hidden = true;
    byId("activate").hidden = false;
    notice = "";
  } catch (error) {
    token = "";
    notice = error.message;
  }
  byId("notice").textContent = notice;
});
byId("activate").addEventListener("submit", (event) => {
  event.preventDefault();
  const [shadow, allowed] = [Number(byId("shadow").value), byId("allowed").value / 100];
  order("api/activate", { bundle: byId("bundle").value, shadow, allowed });
});
byId("rollback").addEventListener("click", () => order("api/rollback", {}));
byId("cancel").addEventListener("click", () => order("api/cancel", {}));
byId("opacity").addEventListener("input", draw);
byId("hold").addEventListener("click", () => { hold(held ? null : state && state.live[camera]); if (state) live(); });
byId("all").addEventListener("click", () => { onlyBad = false; if (state) outcomes(); });
byId("bad").addEventListener("click", () => { onlyBad = true; if (state) outcomes(); });
poll();
