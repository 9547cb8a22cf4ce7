"""Style sheet of the page: light and dark, wide and narrow, without external resources."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --text: #1b2330; --soft: #5a6474; --line: #dfe3e9;
  --accent: #1f5fd0; --stripe: #f7f8fa; --note: #fff8e6; --note-line: #e5c76b;
  --c0: #1f5fd0; --c1: #d4541f; --c2: #1d8a4e; --c3: #8a3fb3; --c4: #a87900; --c5: #0a8796;
  --c6: #c22d6d; --c7: #5d6675;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141a; --card: #181e27; --text: #e3e8ef; --soft: #9aa5b5; --line: #2d3643;
    --accent: #7fb0ff; --stripe: #1d2530; --note: #2a2516; --note-line: #7a6525;
    --c0: #6ea3ff; --c1: #ff8b5c; --c2: #52cc8b; --c3: #c58af0; --c4: #e5bb45; --c5: #4fcadb;
    --c6: #ff7fb2; --c7: #a5afbd;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%;
}
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 32px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 14px; }
h3 { font-size: 1rem; margin: 22px 0 8px; }
p { margin: 0 0 12px; max-width: 75ch; overflow-wrap: anywhere; }
a { color: var(--accent); }
.soft, footer { color: var(--soft); }
footer { padding: 8px 20px 40px; font-size: .875rem; }
nav { margin: 16px 0 20px; font-size: .9375rem; }
nav ul, .legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0; padding: 0;
}
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 22px 24px; margin: 0 0 20px; scroll-margin-top: 12px;
}
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 12px;
  margin: 0 0 20px;
}
.facts div {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px;
}
.facts dt { color: var(--soft); font-size: .8125rem; }
.facts dd { margin: 0; font-size: 1.5rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr));
  gap: 24px 32px;
}
figure { margin: 0; min-width: 0; }
figure h3, figure h4 { margin: 0 0 4px; font-size: .9375rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .x { text-anchor: middle; }
svg .y { text-anchor: end; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg polyline { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
svg circle { fill: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
.dashed polyline { stroke-dasharray: 5 3; }
.legend { font-size: .8125rem; margin-bottom: 4px; gap: 2px 14px; }
.legend li::before {
  content: ""; display: inline-block; width: 16px; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid currentColor;
}
.legend .dashed::before { border-top-style: dashed; }
.scroll { overflow-x: auto; margin: 0 0 16px; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 6px; overflow-wrap: anywhere; }
th, td {
  padding: 5px 14px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap;
}
th:first-child { text-align: left; padding-left: 6px; }
thead th { color: var(--soft); font-weight: 600; font-size: .8125rem; }
tbody th { font-weight: 500; }
tbody tr:nth-child(even) { background: var(--stripe); }
.words td, .words th {
  text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 5em;
}
.note {
  background: var(--note); border-left: 3px solid var(--note-line); padding: 8px 12px;
  border-radius: 4px; font-size: .9375rem;
}
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; color: var(--accent); }
pre {
  overflow: auto; max-height: 480px; font-size: .8125rem; line-height: 1.45; padding: 12px;
  background: var(--stripe); border: 1px solid var(--line); border-radius: 6px;
}
.picture { margin: 0 0 22px; }
figcaption { margin-bottom: 6px; overflow-wrap: anywhere; }
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 10px;
}
.pair img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.pair p { margin: 2px 0 0; font-size: .8125rem; color: var(--soft); }
@media (max-width: 560px) {
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  section { padding: 16px 14px; border-radius: 8px; }
  h1 { font-size: 1.4rem; }
  th, td { padding: 5px 9px; }
  .words { font-size: .8125rem; }
  .words th, .words td { padding: 5px 6px; }
}
@media print { section { break-inside: avoid; } nav { display: none; } }
"""
