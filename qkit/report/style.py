"""The style of the page: one column, a light and a dark scheme, and no font or picture from elsewhere."""

CSS = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1f2328; --soft: #5e6670; --line: #e3e0d9;
  --float: #8b939d; --ptq: #c77d1e; --ptq-soft: #e3bd8a; --qat: #12786f; --moved: #7456b3; --moved-too: #b4557f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --card: #1d2024; --ink: #e8e6e1; --soft: #a2a9b2; --line: #33383e;
    --float: #8f98a3; --ptq: #e09b45; --ptq-soft: #8f6a3c; --qat: #3fb5a8; --moved: #a58ae0; --moved-too: #dd8bae; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main, footer { max-width: 940px; margin: 0 auto; padding: 0 24px; }
main { padding-top: 56px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 56px 0 6px; }
p { margin: 0 0 14px; max-width: 68ch; }
.lede { font-size: 18px; color: var(--soft); }
.note { color: var(--soft); font-size: 14.5px; } .scroll + .note { margin-top: 14px; }
dl.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px; margin: 28px 0 0; }
dl.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
dl.figures dt { color: var(--soft); font-size: 14px; }
dl.figures dd { margin: 2px 0 0; font-size: 26px; font-weight: 600; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
dl.figures small { display: block; font-size: 13px; font-weight: 400; letter-spacing: 0; color: var(--soft); }
figure { margin: 18px 0 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px 14px; }
figcaption { font-weight: 600; font-size: 15px; margin-bottom: 10px; }
figcaption span { display: block; font-weight: 400; color: var(--soft); font-size: 14px; }
svg { display: block; overflow: visible; font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg text { fill: var(--ink); } svg .tick { fill: var(--soft); font-size: 12px; }
svg .value { font-variant-numeric: tabular-nums; font-weight: 600; }
svg .value, svg .point, svg .name, svg .tick { paint-order: stroke; stroke: var(--card); stroke-width: 3px;
  stroke-linejoin: round; }
svg .point { font-size: 12px; } svg circle { stroke: var(--card); stroke-width: 1.5; }
svg .rule { stroke: var(--line); stroke-width: 1; } svg .zero { stroke: var(--soft); stroke-width: 1; }
svg .whisker { stroke: var(--ink); stroke-width: 1.4; fill: none; }
.float { fill: var(--float); } .ptq { fill: var(--ptq); } .longer { fill: var(--ptq-soft); }
.qat { fill: var(--qat); } .moved { fill: var(--moved); } .moved-too { fill: var(--moved-too); }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 10px 0 0; padding: 0; font-size: 14px;
  color: var(--soft); }
ul.legend svg { display: inline-block; flex: none; width: 11px; height: 11px; margin-right: 7px; }
.scroll { overflow-x: auto; margin: 18px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
caption { text-align: left; font-weight: 600; font-size: 15px; padding-bottom: 8px; }
th, td { text-align: right; padding: 7px 0 7px 12px; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums;
  white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; border-bottom-color: var(--soft); white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: normal; overflow-wrap: anywhere; min-width: 9ch; }
td small { display: block; color: var(--soft); font-size: 12.5px; }
details { margin: 16px 0 0; } summary { cursor: pointer; color: var(--soft); font-size: 14.5px; }
footer { margin-top: 64px; padding-top: 28px; padding-bottom: 64px; border-top: 1px solid var(--line); font-size: 14.5px; }
footer h2 { font-size: 16px; margin: 26px 0 4px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main, footer { padding: 0 14px; } main { padding-top: 28px; } h1 { font-size: 24px; }
  figure { padding: 12px; } dl.figures { grid-template-columns: 1fr 1fr; gap: 10px; } dl.figures dd { font-size: 20px; }
  dl.figures div { padding: 10px 12px; overflow-wrap: anywhere; }
  table, tbody, tr { display: block; } thead { display: none; } caption { display: block; }
  tr { padding: 10px 0; border-bottom: 1px solid var(--line); }
  tbody th, td { display: flex; justify-content: space-between; gap: 14px; padding: 2px 0; border: 0; text-align: right;
    white-space: normal; overflow-wrap: anywhere; }
  tbody th { font-weight: 600; } td:has(> span:empty) { display: none; }
  td::before { content: attr(data-column); color: var(--soft); text-align: left; }
}
@media print { body { background: none; } figure, dl.figures div { break-inside: avoid; } }
"""
