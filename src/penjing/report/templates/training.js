"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colours = ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7"];

  function draw(id, chart, xTitle, logarithmic) {
    const canvas = document.getElementById(id);
    if (!canvas || !chart || !chart.sets.length) return;
    canvas.closest("figure").hidden = false;
    const axis = (title, type) => ({
      type, title: { display: true, text: title, color: css("--soft") },
      grid: { color: css("--line") }, ticks: { color: css("--soft") }, border: { color: css("--line") },
    });
    const sets = chart.sets.map((set, i) => ({
      label: set.label + (set.best ? " (chosen)" : ""),
      data: set.points.map(([x, y]) => ({ x, y })),
      borderColor: set.best ? css("--accent") : colours[i % colours.length],
      borderWidth: set.best ? 3 : 1.5, pointRadius: set.points.length > 30 ? 0 : 3, fill: false, tension: 0,
    }));
    const longest = Math.max(...chart.sets.flatMap((set) => set.points.map(([x]) => x)));
    if (chart.goal !== undefined) {
      sets.push({
        label: "goal", data: [{ x: 0, y: chart.goal }, { x: longest, y: chart.goal }],
        borderColor: css("--muted"), borderDash: [6, 4], borderWidth: 1.5, pointRadius: 0, fill: false,
      });
    }
    new Chart(canvas, {
      type: "line", data: { datasets: sets },
      options: {
        responsive: true, maintainAspectRatio: false, animation: false, parsing: false,
        interaction: { mode: "nearest", intersect: false },
        scales: { x: axis(xTitle, logarithmic ? "logarithmic" : "linear"), y: axis(chart.y, "linear") },
        plugins: { legend: { labels: { color: css("--ink"), usePointStyle: true, boxHeight: 7 } } },
      },
    });
  }

  draw("curves", data.curves, "seconds of training", false);
  draw("ranges", data.ranges, "learning rate", true);
})();
