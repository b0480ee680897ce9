"use strict";
(() => {
  const numbers = JSON.parse(document.getElementById("numbers").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  const format = (value, digits = 5) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (value !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(Math.max(digits - 3, 1)).replace("e+", "e");
    return Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits });
  };
  const bytes = (count) => {
    for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (count >= size) return `${format(count / size, 3)} ${unit}`;
    return `${count} B`;
  };
  const seconds = (value) => (value < 1 ? `${format(value * 1e3, 3)} ms` : `${format(value, 4)} s`);

  // A tip beside a place of its plot, kept inside of it; lines are set as text, never as HTML.
  const showTip = (tip, left, top, lines) => {
    tip.replaceChildren(...lines.map((line, at) => {
      const element = document.createElement(at ? "span" : "strong");
      element.textContent = line;
      return element;
    }));
    tip.hidden = false;
    const room = tip.parentElement.clientWidth - tip.offsetWidth;
    const beside = left + 14 + tip.offsetWidth > tip.parentElement.clientWidth ? left - tip.offsetWidth - 14 : left + 14;
    tip.style.left = `${clamp(beside, 0, Math.max(room, 0))}px`;
    tip.style.top = `${top}px`;
  };

  const nearest = (sorted, value) => {
    let low = 0, high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= value) low = middle; else high = middle;
    }
    return Math.abs(sorted[high] - value) < Math.abs(sorted[low] - value) ? high : low;
  };

  for (const figure of document.querySelectorAll(".chart")) {
    const { series, bounds: [xLow, xHigh], unit } = numbers.charts[Number(figure.dataset.chart)];
    const plot = figure.querySelector(".plot"), tip = figure.querySelector(".tip");
    const cursor = figure.querySelector(".cursor"), said = figure.querySelector(".said");
    const steps = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
    const reach = (xHigh - xLow) / 100;
    let chosen = steps.length - 1;

    const show = (at, speak) => {
      chosen = clamp(at, 0, steps.length - 1);
      const step = steps[chosen];
      const lines = [`Step ${step.toLocaleString("en")}`];
      for (const one of series) {
        const place = nearest(one.x, step);
        if (!one.x.length || Math.abs(one.x[place] - step) > reach) continue;
        const value = format(one.y[place]) + (unit && one.y[place] !== null ? ` ${unit}` : "");
        lines.push(series.length > 1 ? `${one.name}: ${value}` : value);
      }
      const share = (step - xLow) / (xHigh - xLow);
      cursor.setAttribute("d", `M${share * 1000} 0V1000`);
      showTip(tip, share * plot.clientWidth, 4, lines);
      if (speak) said.textContent = lines.join(", ");
    };
    const hide = () => { tip.hidden = true; cursor.setAttribute("d", ""); };

    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      show(nearest(steps, xLow + (event.clientX - box.left) / box.width * (xHigh - xLow)), false);
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const far = Math.max(Math.round(steps.length / 20), 1);
      const to = { ArrowLeft: chosen - 1, ArrowRight: chosen + 1, PageUp: chosen + far, PageDown: chosen - far, Home: 0, End: steps.length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (to === undefined) return;
      event.preventDefault();
      show(to, true);
    });
  }

  const figure = document.querySelector(".timeline");
  if (!figure) return;
  const { bars, lanes, seconds: whole } = numbers.timeline;
  const plot = figure.querySelector(".plot"), svg = plot.querySelector("svg"), tip = figure.querySelector(".tip");
  const said = figure.querySelector(".said"), axis = figure.querySelector(".x"), names = svg.querySelector(".names");
  const rects = [...svg.querySelectorAll(".bars rect")];
  const height = Number(svg.getAttribute("viewBox").split(" ")[3]);
  const tops = rects.map((rect) => Number(rect.getAttribute("y")));
  let from = 0, to = whole, chosen = -1, width = 1000;

  // The box gets the size it has on the screen, so that names in bars are not stretched.
  const draw = () => {
    width = Math.max(plot.clientWidth, 1);
    const scale = width / (to - from);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const texts = [];
    bars.forEach(([, name, start, end], at) => {
      const left = clamp((start - from) * scale, -2, width + 2), right = clamp((end - from) * scale, -2, width + 2);
      rects[at].setAttribute("x", left);
      rects[at].setAttribute("width", right - left > 4 ? right - left - 1 : right - left); // a gap between neighbours
      const text = name.replace(/^layer (\d+).*/, right - left > 60 ? "layer $1" : "$1");
      if (right - left > 7 * text.length + 6) texts.push([text, (Math.max(left, 0) + Math.min(right, width)) / 2, tops[at] + 12]);
    });
    names.replaceChildren(...texts.map(([text, x, y]) => {
      const element = document.createElementNS(SVG, "text");
      element.textContent = text;
      element.setAttribute("x", x);
      element.setAttribute("y", y);
      element.setAttribute("text-anchor", "middle");
      return element;
    }));
    const about = (to - from) / Math.max(width / 130, 2), power = 10 ** Math.floor(Math.log10(about));
    const step = [1, 2, 5, 10].map((times) => times * power).find((one) => one >= about);
    const marks = [];
    for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step) {
      const element = document.createElement("span");
      element.textContent = tick < step / 2 ? "0" : `${format(tick, 6)} s`;
      element.style.left = `${(tick - from) / (to - from) * 100}%`;
      marks.push(element);
    }
    axis.replaceChildren(...marks);
  };
  const view = (start, end) => {
    const length = clamp(end - start, whole / 5000, whole);
    from = clamp(start, 0, whole - length);
    to = from + length;
    draw();
  };
  const zoom = (factor, around = (from + to) / 2) => view(around - (around - from) * factor, around + (to - around) * factor);

  const mark = (at) => {
    if (chosen >= 0) rects[chosen].classList.remove("chosen");
    chosen = at;
    if (at < 0) { tip.hidden = true; return; }
    const [lane, name, start, end, size, cut] = bars[at];
    rects[at].classList.add("chosen");
    const lines = [name, `${lanes[lane]}: ${seconds(end - start)}, from ${seconds(start)} to ${seconds(end)}`];
    if (size) lines.push(bytes(size) + (cut || end === start ? "" : `, ${bytes(size / (end - start))}/s`));
    if (cut) lines.push("crosses the edge of the step");
    const middle = (Math.max(start, from) + Math.min(end, to)) / 2;
    showTip(tip, (middle - from) / (to - from) * width, tops[at] + 24, lines);
    return lines;
  };
  const at = (event) => {
    const box = plot.getBoundingClientRect();
    const moment = from + (event.clientX - box.left) / box.width * (to - from), y = event.clientY - box.top;
    const slack = 2 / width * (to - from);
    let best = -1;
    bars.forEach(([, , start, end], index) => {
      if (y < tops[index] - 1 || y > tops[index] + 17 || moment < start - slack || moment > end + slack) return;
      if (best < 0 || end - start < bars[best][3] - bars[best][2]) best = index;
    });
    return [best, moment];
  };

  let drag = null;
  plot.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, from, to }; });
  addEventListener("pointerup", () => { drag = null; });
  addEventListener("pointercancel", () => { drag = null; });
  plot.addEventListener("pointermove", (event) => {
    if (drag && event.buttons && Math.abs(event.clientX - drag.x) > 3 && drag.to - drag.from < whole) {
      const shift = (drag.x - event.clientX) / width * (drag.to - drag.from);
      mark(-1);
      view(drag.from + shift, drag.to + shift);
    } else mark(at(event)[0]);
  });
  plot.addEventListener("pointerleave", () => mark(-1));
  plot.addEventListener("blur", () => mark(-1));
  plot.addEventListener("dblclick", (event) => zoom(0.4, at(event)[1]));
  plot.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return; // the page scrolls
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) zoom(1.0015 ** event.deltaY, at(event)[1]);
    else view(from + event.deltaX / width * (to - from), to + event.deltaX / width * (to - from));
  }, { passive: false });

  const order = lanes.map((_, lane) => bars.map((_, index) => index).filter((index) => bars[index][0] === lane));
  const unit = (name) => name.split(" ", 2).join(" ");
  const go = (index) => {
    const [, , start, end] = bars[index];
    if (end < from || start > to) view((start + end) / 2 - (to - from) / 2, (start + end) / 2 + (to - from) / 2);
    said.textContent = mark(index).join(", ");
  };
  plot.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const zooms = { "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1 / 0.6), 0: () => view(0, whole), Escape: () => mark(-1) };
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (zooms[event.key]) zooms[event.key]();
    else if (moves[event.key]) {
      const [along, across] = moves[event.key];
      if (chosen < 0) go(order[0][0]);
      else if (along) {
        const lane = order[bars[chosen][0]];
        go(lane[clamp(lane.indexOf(chosen) + along, 0, lane.length - 1)]);
      } else {
        // to the same layer where the other lane has it, else to what began at about the same time
        const [own, name, start] = bars[chosen];
        const lane = order[clamp(own + across, 0, lanes.length - 1)];
        const same = lane.filter((index) => unit(bars[index][1]) === unit(name));
        go((same.length ? same : lane).reduce((a, b) => (Math.abs(bars[b][2] - start) < Math.abs(bars[a][2] - start) ? b : a)));
      }
    } else return;
    event.preventDefault();
  });
  const buttons = figure.querySelector(".zoom");
  buttons.hidden = false;
  buttons.addEventListener("click", (event) => {
    const way = event.target.dataset.zoom;
    if (way === "all") view(0, whole);
    else if (way) zoom(way === "in" ? 0.5 : 2);
  });
  new ResizeObserver(draw).observe(plot);
  draw();
})();
