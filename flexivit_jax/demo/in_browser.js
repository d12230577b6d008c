// Photos of one's own, prepared and answered in the browser by onnxruntime-web; from a web server, not from the disk.
const MOST_PIXELS = 50e6, TOP = 5;
const OWN = DEMO.own;
let runtime = null;
const sessions = {};
let turn = Promise.resolve();  // one answer after the other: a session runs once at a time

async function opened(graph) {
  if (!runtime) {
    const base = new URL("ort/", location.href).href;
    const ort = await import(base + "ort.wasm.min.mjs");
    ort.env.wasm.wasmPaths = base;
    ort.env.wasm.numThreads = 1;
    const weights = await fetch("model/weights.bin");
    if (!weights.ok) throw new Error("model/weights.bin is missing beside this page; write the page again");
    runtime = {ort, weights: new Uint8Array(await weights.arrayBuffer())};
  }
  const externalData = [{path: "weights.bin", data: runtime.weights}];
  if (!sessions[graph]) {
    const made = runtime.ort.InferenceSession.create("model/" + graph, {executionProviders: ["wasm"], externalData});
    sessions[graph] = made;
    made.catch(() => { delete sessions[graph]; });  // the next try begins anew
  }
  return sessions[graph];
}

async function decoded(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {colorSpaceConversion: "none", premultiplyAlpha: "none"});
  } catch (e) {
    throw new Error("this browser cannot read it. Expected a photo as JPEG, PNG or WebP");
  }
  if (bitmap.width * bitmap.height > MOST_PIXELS)
    throw new Error(`${bitmap.width} x ${bitmap.height} pixels; at most ${MOST_PIXELS / 1e6} million`);
  return bitmap;
}

// --- the model's preprocessing, as flexivit_jax/data does it; a canvas's own smoothing is another one ---

function pixelsOf(bitmap) {  // {h, w, data: 3 values a pixel}
  const {width: w, height: h} = bitmap, canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(bitmap, 0, 0);
  const from = context.getImageData(0, 0, w, h).data, data = new Uint8ClampedArray(h * w * 3);
  for (let i = 0; i < h * w; i++) {
    if (from[4 * i + 3] < 255) throw new Error("it has transparent parts, whose colours a browser does not give. Save it without transparency");
    for (let c = 0; c < 3; c++) data[3 * i + c] = from[4 * i + c];
  }
  return {h, w, data};
}
const cubic = (x) => x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;  // Keys, a = -0.5
const triangle = (x) => Math.max(0, 1 - x);
function taps(i, n, old, method) {  // [first, weights]: what an output pixel is made of, along one axis
  const scale = old / n;
  if (method === "linear") {
    const at = Math.min(Math.max((i + 0.5) * scale - 0.5, 0), old - 1), low = Math.min(Math.floor(at), Math.max(old - 2, 0));
    return [low, old > 1 ? [1 - (at - low), at - low] : [1]];
  }
  if (method === "area") {
    const from = i * scale, to = (i + 1) * scale, first = Math.floor(from), last = Math.min(Math.ceil(to - 1e-9), old);
    const weights = [];
    for (let x = first; x < last; x++) weights.push((Math.min(x + 1, to) - Math.max(x, from)) / scale);
    return [first, weights];
  }
  const [filter, reach] = method === "pil_bilinear" ? [triangle, 1] : [cubic, 2];
  const wide = Math.max(scale, 1), centre = (i + 0.5) * scale;
  const first = Math.max(0, Math.trunc(centre - reach * wide + 0.5)), last = Math.min(old, Math.trunc(centre + reach * wide + 0.5));
  const weights = [];
  for (let x = first; x < last; x++) weights.push(filter(Math.abs((x - centre + 0.5) / wide)));
  const sum = weights.reduce((a, b) => a + b, 0);
  return [first, weights.map((weight) => weight / sum)];
}
function resized({h, w, data}, [high, wide], method) {
  if (h === high && w === wide) return {h, w, data};
  if (method === "area" && (high > h || wide > w)) method = "linear";
  const rounds = method !== "linear" && method !== "area";  // Pillow rounds between the two passes
  const middle = new (rounds ? Uint8ClampedArray : Float32Array)(h * wide * 3), out = new Uint8ClampedArray(high * wide * 3);
  for (let x = 0; x < wide; x++) {
    const [first, weights] = taps(x, wide, w, method);
    for (let y = 0; y < h; y++)
      for (let c = 0; c < 3; c++)
        middle[3 * (y * wide + x) + c] = weights.reduce((sum, v, k) => sum + v * data[3 * (y * w + first + k) + c], 0);
  }
  for (let y = 0; y < high; y++) {
    const [first, weights] = taps(y, high, h, method);
    for (let i = 0; i < 3 * wide; i++)
      out[3 * wide * y + i] = weights.reduce((sum, v, k) => sum + v * middle[3 * wide * (first + k) + i], 0);
  }
  return {h: high, w: wide, data: out};
}
const even = (v) => Math.abs(v % 1) === 0.5 ? 2 * Math.round(v / 2) : Math.round(v);  // as Python rounds
function small({h, w}, step) {
  const size = step.small, long = Math.trunc(size * Math.max(h, w) / Math.min(h, w)), factor = size / Math.min(h, w);
  if (step.rounding === "down") return h <= w ? [size, long] : [long, size];
  return [even(h * factor), even(w * factor)];
}
function cropped({h, w, data}, step) {
  const [high, wide] = step.crop, half = (margin) => step.half === "even" ? even(margin / 2) : Math.floor(margin / 2);
  const top = half(h - high), left = half(w - wide), out = new Uint8ClampedArray(high * wide * 3);
  for (let y = 0; y < high; y++) {
    const from = 3 * ((top + y) * w + left);
    out.set(data.subarray(from, from + 3 * wide), 3 * wide * y);
  }
  return {h: high, w: wide, data: out};
}
function prepared(bitmap) {
  let image = pixelsOf(bitmap);
  for (const step of OWN.steps)
    image = step.crop ? cropped(image, step) : resized(image, step.resize || small(image, step), step.method);
  return image;
}

// --- the model ---

function computed(photo, one) {
  const wait = turn.then(() => photo.answers[one.key] || run(photo, one));
  turn = wait.catch(() => {});
  return wait;
}
async function run(photo, one) {
  if (!state.alone) [state.alone, state.times] = [true, {}];  // what was measured elsewhere says nothing of this browser
  const session = await opened(OWN.graphs[one.key]);
  const {ort} = runtime, [low, high] = OWN.range, {data: pixels} = photo.pixels, [h, w] = OWN.hw;
  const input = new Float32Array(h * w * 3);
  for (let i = 0; i < input.length; i++) input[i] = pixels[i] / 255 * (high - low) + low;
  const begin = performance.now();
  const {logits} = await session.run({image: new ort.Tensor("float32", input, [1, h, w, 3])});
  const ms = performance.now() - begin;
  const values = [...logits.data], most = Math.max(...values), scores = values.map((v) => Math.exp(v - most));
  const sum = scores.reduce((a, b) => a + b, 0);
  const order = scores.map((p, i) => [p / sum, i]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, TOP);
  return {top: order.map(([p, i]) => ({class: i, probability: p, ...(OWN.names[i] && {name: OWN.names[i]})})), ms};
}

async function ownAlone(file) {
  const pixels = prepared(await decoded(file)), canvas = document.createElement("canvas"), {h, w, data} = pixels;
  [canvas.width, canvas.height] = [w, h];
  const shown = new ImageData(w, h);
  for (let i = 0; i < h * w; i++) shown.data.set([data[3 * i], data[3 * i + 1], data[3 * i + 2], 255], 4 * i);
  canvas.getContext("2d").putImageData(shown, 0, 0);
  return {name: file.name, src: canvas.toDataURL(), answers: {}, pixels};
}
