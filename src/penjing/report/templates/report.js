"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const round = (x) => (x === null || x === undefined ? "—" : String(Number(x.toPrecision(4))));
  const short = (text, n) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
  const wrap = (text, n) => text.match(new RegExp(`.{1,${n}}(\\s|$)|.{1,${n}}`, "gu")) || [text];
  const made = [];

  // Chart.js draws no error bars: each point carries its bounds and this draws them under the dots.
  const whiskers = {
    id: "whiskers",
    beforeDatasetsDraw(chart) {
      const { ctx, scales: { x, y }, chartArea: box } = chart;
      ctx.save();
      ctx.beginPath();
      ctx.rect(box.left, box.top, box.right - box.left, box.bottom - box.top);
      ctx.clip();
      ctx.lineWidth = 1.5;
      chart.data.datasets.forEach((set, i) => {
        if (!set.whiskers || !chart.isDatasetVisible(i)) return;
        ctx.strokeStyle = set.borderColor;
        ctx.globalAlpha = 0.55;
        set.whiskers.forEach((w, j) => {
          const dot = chart.getDatasetMeta(i).data[j];
          if (!w || !dot) return;
          ctx.beginPath();
          if (w.ylow !== undefined) {
            ctx.moveTo(dot.x, y.getPixelForValue(w.ylow));
            ctx.lineTo(dot.x, y.getPixelForValue(w.yhigh));
          }
          if (w.xlow !== undefined) {
            ctx.moveTo(x.getPixelForValue(w.xlow), dot.y);
            ctx.lineTo(x.getPixelForValue(w.xhigh), dot.y);
          }
          ctx.stroke();
        });
      });
      ctx.restore();
    },
  };

  function palette() {
    return {
      ink: css("--ink"), soft: css("--soft"), line: css("--line"), accent: css("--accent"),
      good: css("--good"), bad: css("--bad"), open: css("--open"), muted: css("--muted"), card: css("--card"),
    };
  }

  function make(id, config, wanted) {
    const canvas = document.getElementById(id);
    if (!canvas || !wanted) return;
    const figure = canvas.closest("figure");
    figure.hidden = false;
    const chart = new Chart(canvas, config);
    canvas.dataset.chart = chart.config.type;
    made.push(chart);
  }

  function base(p, x, y) {
    const axis = (title) => ({
      title: { display: true, text: title, color: p.soft },
      grid: { color: p.line }, ticks: { color: p.soft, maxRotation: 60 }, border: { color: p.line },
    });
    return {
      responsive: true, maintainAspectRatio: false, animation: false,
      interaction: { mode: "nearest", intersect: false },
      scales: { x: axis(x), y: axis(y) },
      plugins: { legend: { labels: { color: p.ink, usePointStyle: true, boxHeight: 7 } },
                 tooltip: { displayColors: false } },
    };
  }

  // The axis shows whole intervals, but no percentage above 100.
  function fit(axis, intervals, title) {
    const low = Math.min(...intervals.map((w) => w.ylow));
    const high = Math.max(...intervals.map((w) => w.yhigh));
    const room = 0.06 * (high - low || Math.abs(high) || 1);
    axis.suggestedMin = low - room;
    axis.suggestedMax = high + room;
    if (title.endsWith("%")) axis.max = Math.min(100, Math.ceil(high + room));
  }

  function pareto(p) {
    const chart = data.pareto;
    if (!chart) return;
    const kinds = [
      ["result", "result", "star", 11, p.accent], ["baseline", "float baseline", "rectRot", 8, p.ink],
      ["feasible", "keeps every limit", "circle", 5, p.good], ["infeasible", "breaks a limit", "crossRot", 6, p.bad],
    ];
    const sets = kinds.filter(([key]) => chart.points[key].length).map(([key, label, style, radius, color]) => ({
      label, data: chart.points[key], whiskers: chart.points[key], pointStyle: style, radius, hoverRadius: radius + 2,
      borderColor: color, backgroundColor: color, borderWidth: style === "star" || style === "crossRot" ? 2.5 : 1,
    }));
    if (chart.points.front.length > 1) {
      sets.push({ label: "Pareto front", data: chart.points.front, type: "line", borderColor: p.muted, borderDash: [5, 4],
                  backgroundColor: p.muted, borderWidth: 1.5, pointRadius: 0, pointHitRadius: 0, pointStyle: "line", stepped: "before" });
    }
    const options = base(p, "latency p50, ms", chart.metric);
    options.scales.x.beginAtZero = true;
    fit(options.scales.y, sets.flatMap((set) => set.whiskers || []), chart.metric);
    options.plugins.tooltip.callbacks = {
      title: (items) => (items.length ? wrap(items[0].raw.name || items[0].dataset.label, 44) : []),
      label: ({ raw, dataset }) => [
        dataset.label + (raw.split ? ` (${raw.split} split)` : ""),
        `${chart.metric}: ${round(raw.y)} (${round(raw.ylow)} to ${round(raw.yhigh)})`,
        `latency: ${round(raw.x)} ms (${round(raw.xlow)} to ${round(raw.xhigh)})`,
        raw.size ? `size: ${round(raw.size / 1000)} kB` : "size: not measured",
      ],
    };
    make("pareto", { type: "scatter", data: { datasets: sets }, options, plugins: [whiskers] }, sets.length);
  }

  function steps(p, id, type) {
    const chart = data[id];
    if (!chart) return;
    const options = base(p, "", chart.axis);
    options.scales.x.title.display = false;
    options.scales.y.beginAtZero = type === "bar";
    options.scales.x.ticks.callback = (_, i) => short(chart.labels[i], 22);
    if (type === "line") {
      options.scales.x.offset = true;
      fit(options.scales.y, chart.points.filter(Boolean).map((v) => ({ ylow: v[1], yhigh: v[2] })), chart.axis);
    }
    options.plugins.legend.display = false;
    const text = (v) => (v ? `${round(v[0])} (${round(v[1])} to ${round(v[2])})` : "not measured");
    options.plugins.tooltip.callbacks = {
      title: (items) => (items.length ? wrap(chart.labels[items[0].dataIndex], 44) : []),
      label: (item) => `${chart.axis}: ${text(chart.points[item.dataIndex])}`,
    };
    const set = {
      label: chart.axis, data: chart.points.map((v) => (v ? v[0] : null)),
      whiskers: chart.points.map((v) => (v ? { ylow: v[1], yhigh: v[2] } : null)),
      borderColor: type === "bar" ? p.ink : p.accent, backgroundColor: p.accent, maxBarThickness: 46,
      borderWidth: type === "bar" ? 0 : 2, pointRadius: 5, pointStyle: "circle",
    };
    const drawn = type === "bar" ? { ...whiskers, beforeDatasetsDraw: undefined, afterDatasetsDraw: whiskers.beforeDatasetsDraw } : whiskers;
    make(id, { type, data: { labels: chart.labels, datasets: [set] }, options, plugins: [drawn] }, true);
  }

  function distribution(p) {
    const lines = data.distribution;
    if (!lines) return;
    const look = { eager: [p.muted, [2, 3]], baseline: [p.ink, [7, 4]], result: [p.accent, []] };
    const sets = lines.map((line) => ({
      label: line.name, borderColor: look[line.role][0], backgroundColor: look[line.role][0], borderDash: look[line.role][1],
      pointRadius: 0, borderWidth: 2.5, pointStyle: "line", showLine: true, role: line.role,
      data: line.ms.map((x, i) => ({ x, y: (100 * i) / (line.ms.length - 1) })),
    }));
    const options = base(p, "latency of a call, ms (logarithmic)", "calls finished, %");
    options.scales.x.type = "logarithmic";
    options.scales.x.ticks.callback = (v) => (/^[125]/.test(String(v).replace(/^[0.]+/, "")) ? round(v) : "");
    options.scales.x.ticks.autoSkip = false;
    options.scales.y.max = 100;
    options.scales.y.min = 0;
    options.plugins.tooltip.callbacks = {
      title: () => "",
      label: ({ raw, dataset }) => `${short(dataset.label, 44)}: ${round(raw.y)}% within ${round(raw.x)} ms`,
    };
    make("distribution", { type: "scatter", data: { datasets: sets }, options }, sets.length);
  }

  function classes(p) {
    const chart = data.classes;
    if (!chart) return;
    const set = (label, values, color, style, border) => ({
      label, data: values, backgroundColor: color, borderColor: border, borderWidth: 1, pointStyle: style, maxBarThickness: 26,
    });
    const options = base(p, "", "recall, %");
    options.scales.x.title.display = false;
    options.scales.x.ticks.callback = (_, i) => short(chart.labels[i], 16);
    options.scales.y.max = 100;
    options.interaction = { mode: "index", intersect: false };
    options.plugins.tooltip.callbacks = {
      label: ({ raw, dataset }) => `${dataset.label}: ${raw === null ? "undefined" : round(raw) + "%"}`,
    };
    const sets = [];
    if (chart.before.some((v) => v !== null)) sets.push(set("before", chart.before, p.line, "rect", p.muted));
    if (chart.after.some((v) => v !== null)) sets.push(set("after", chart.after, p.accent, "rect", p.accent));
    make("classes", { type: "bar", data: { labels: chart.labels, datasets: sets }, options }, sets.length);
  }

  function draw() {
    made.splice(0).forEach((chart) => chart.destroy());
    const p = palette();
    Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
    pareto(p);
    steps(p, "ablation-latency", "bar");
    steps(p, "ablation-quality", "line");
    distribution(p);
    classes(p);
    document.documentElement.dataset.charts = String(made.length);
    if (data.distribution) document.querySelectorAll(".nochart").forEach((e) => { e.hidden = true; });
  }

  function filter() {
    const box = document.getElementById("filter");
    if (!box) return;
    const rows = [...document.querySelectorAll("#layers tbody tr")];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const count = document.getElementById("filter-count");
    const apply = () => {
      const wanted = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        row.hidden = !wanted.every((word) => texts[i].includes(word));
        shown += row.hidden ? 0 : 1;
      });
      count.textContent = `${shown} of ${rows.length} rows`;
    };
    box.closest(".filter").hidden = false;
    box.addEventListener("input", apply);
    apply();
  }

  filter();
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((d) => { d.open = true; });
    made.forEach((chart) => chart.resize());
  });
  addEventListener("afterprint", () => made.forEach((chart) => chart.resize()));
})();
