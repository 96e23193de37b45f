"""The page of `smi_fed.report_page`, in Jinja. A Python file, because Flower ships no HTML with an app."""

TEMPLATE = r"""
{%- macro bar(share) -%}
{% if share is not none %}<span class="bar"><span style="width:{{ '%.1f' | format(100 * share) }}%"></span></span>
{% endif %}{{ share | percent }}
{%- endmacro -%}
{%- macro line_chart(chart) %}
<figure>
<figcaption>{{ chart.title }}</figcaption>
<svg viewBox="0 0 480 232" role="img" aria-label="{{ chart.title }}">
{% for at, label in chart.yticks %}
<path class="grid" d="M{{ chart.left }},{{ at }}H{{ chart.right }}"/>
<text x="{{ chart.left - 8 }}" y="{{ at + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for at, label in chart.xticks %}
<text x="{{ at }}" y="{{ chart.bottom + 18 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}
<text x="{{ chart.right }}" y="{{ chart.bottom + 38 }}" text-anchor="end">{{ chart.xlabel }}</text>
{% for line in chart.lines %}
<path class="line" stroke="var(--{{ line.colour }})" stroke-dasharray="{{ line.dashes or 'none' }}"
 d="M{% for x, y in line.points %}{{ x }},{{ y }} {% endfor %}"/>
<circle cx="{{ line.points[-1][0] }}" cy="{{ line.points[-1][1] }}" r="4" fill="var(--{{ line.colour }})"/>
{% endfor %}
</svg>
<ul>{% for line in chart.lines %}
<li><svg viewBox="0 0 24 8" class="key"><path class="line" stroke="var(--{{ line.colour }})"
 stroke-dasharray="{{ line.dashes or 'none' }}" d="M0,4H24"/></svg>{{ line.label }}</li>{% endfor %}</ul>
</figure>
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>smi-fed: {{ name }}</title>
<style>
:root { {% for key, colour in light.items() %}--{{ key }}: {{ colour }}; {% endfor %} }
@media (prefers-color-scheme: dark) {
:root { {% for key, colour in dark.items() %}--{{ key }}: {{ colour }}; {% endfor %} }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.15rem; }
p { margin: .3rem 0; }
.quiet, figcaption, th, code { color: var(--quiet); }
code { font: 12px ui-monospace, monospace; white-space: nowrap; }
figure, .tile, .wide { margin: 0; border: 1px solid var(--edge); border-radius: .5rem; background: var(--card); }
figure + figure { margin-top: .8rem; }
.charts figure { margin: 0; }
figure, .tile { padding: .8rem 1rem; }
.tiles { margin-top: 1rem; }
.tiles, .charts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.tile b { display: block; font-size: 1.6rem; line-height: 1.3; }
svg { width: 100%; height: auto; }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--edge); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0 0; padding: 0; list-style: none; }
.key { width: 24px; margin-right: .4rem; vertical-align: middle; }
.swatch { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; border-radius: 2px; }
.stages { display: flex; gap: 2px; height: 1.6rem; border-radius: .3rem; overflow: hidden; }
.wide, .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.wide table { width: 100%; }
th, td { padding: .4rem .7rem; border-top: 1px solid var(--edge); text-align: left; vertical-align: top; }
thead th, .more td { border-top: 0; }
.more td { padding-top: 0; overflow-wrap: anywhere; }
th { font-weight: 500; }
.number { text-align: right; }
.number, .status, .images th:first-child { white-space: nowrap; }
.name { min-width: 10rem; max-width: 18rem; overflow-wrap: anywhere; }
tr.ensemble td, tr.student td { background: var(--page); }
.bar { display: inline-block; width: 4rem; height: .6rem; border-radius: 2px; background: var(--edge); }
.bar span { display: block; height: 100%; border-radius: 2px; background: var(--client); }
.ensemble .bar span { background: var(--ensemble); }
.student .bar span { background: var(--student); }
.own .bar span { background: var(--client); }
.images th, .images td { border: 0; padding: .1rem; text-align: center; vertical-align: middle; font-weight: 400; }
.images th:first-child { padding-right: .8rem; text-align: right; }
img { display: block; width: 64px; height: 64px; object-fit: contain; }
img.small { image-rendering: pixelated; }
img.kept { background: repeating-linear-gradient(45deg, var(--edge) 0 3px, transparent 3px 8px); }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p class="quiet">{{ about }}</p>
{% if reason %}<p><b>{{ reason }}</b></p>{% endif %}
<div class="tiles">
{% for label, value, note in tiles %}
<div class="tile"><span class="quiet">{{ label }}</span><b>{{ value }}</b><span class="quiet">{{ note }}</span></div>
{% endfor %}
</div>
{% if charts %}
<h2>Curves</h2>
<div class="charts">{% for each in charts %}{{ line_chart(each) }}{% endfor %}</div>
{% endif %}
{% if clients %}
<h2>Clients</h2>
<div class="wide"><table>
<thead><tr><th>Client</th><th>Last round</th><th>Architecture</th><th>Start</th><th class="number">Examples</th>
<th class="number">Test split</th>
{% if asked %}<th class="number">Student, held out</th>
<th class="number">Own model, held out</th>{% endif %}</tr></thead>
{% for each in clients %}
<tr class="{{ each.kind }}"><td class="name">{{ each.name }}<br><code>{{ each.node }}</code></td>
<td class="status">{% if each.kind == "client" %}{{ "✓ admitted" if each.admitted else "✕ refused" }}
{% if rounds | length > 1 %}<br><span class="quiet">{{ each.times }} of {{ rounds | length }} rounds</span>{% endif %}
{% endif %}</td>
<td>{{ each.architecture }}</td><td>{{ each.start or "" }}</td><td class="number">{{ each.num_examples }}</td>
<td class="number">{{ bar(each.test_accuracy) }}</td>
{% if asked %}
<td class="number student">{{ bar(each.there.student_accuracy) }}<br>
<span class="quiet">{% if each.there.images %}of {{ each.there.images }}{% endif %}</span></td>
<td class="number own">{{ bar(each.there.own_accuracy) }}</td>
{% endif %}</tr>
{% if each.note %}<tr class="more"><td></td><td colspan="7">{{ each.note }}</td></tr>{% endif %}
{% endfor %}
</table></div>
{% endif %}
{% if refused and rounds | length > 1 %}
<h2>Refused</h2>
<div class="wide"><table>
<thead><tr><th>Round</th><th>Client</th><th>Reason</th></tr></thead>
{% for each in refused %}
<tr><td>{{ each.round }}</td><td class="name">{{ each.name }}<br><code>{{ each.node }}</code></td>
<td>{{ each.reason }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{% if pictures %}
<h2>Images</h2>
<p class="quiet">What each client's model gave; hatched are patches that stopped before the end.</p>
{% for each in pictures %}
<figure><figcaption>{{ each.name }}, {{ each.kept | percent }} of the patches kept</figcaption>
<div class="scroll"><table class="images">
<tr><th></th>{% for label in each.labels %}<th>{{ label }}</th>{% endfor %}</tr>
{% for row, images in each.rows.items() %}
<tr><th>{{ row }}</th>{% for image in images %}
<td>{% if image %}<img class="{{ image.kind }}" src="{{ image.uri }}" alt="{{ row }}: {{ image.alt }}">{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</table></div></figure>
{% endfor %}
{% endif %}
{% if stages %}
<h2>Time</h2>
<div class="stages">{% for each in stages %}
<span style="width:{{ '%.2f' | format(100 * each.share) }}%;background:var(--{{ each.colour }})"></span>
{% endfor %}</div>
<ul>{% for each in stages %}
<li><span class="swatch" style="background:var(--{{ each.colour }})"></span>
{{- each.name }}: {{ each.seconds | duration }} ({{ each.share | percent }})</li>
{% endfor %}</ul>
{% endif %}
{% if rounds %}
<h2>Rounds</h2>
<div class="wide"><table>
<thead><tr><th class="number">Round</th><th class="number">Student</th><th class="number">Admitted</th>
<th class="number">Refused</th><th class="number">Images</th><th class="number">Inversion</th>
<th class="number">Distillation</th><th class="number">Ended after</th></tr></thead>
{% for each in rounds %}
<tr><td class="number">{{ each.round }}</td><td class="number">{{ each.student_test_accuracy | percent }}</td>
{% if "inversion" in each %}
<td class="number">{{ each.admitted | length }}</td><td class="number">{{ each.refused | length }}</td>
<td class="number">{{ each.inversion.images }}</td><td class="number">{{ each.inversion.seconds | duration }}</td>
<td class="number">{{ each.distillation.seconds | duration }}</td>
{% else %}<td></td><td></td><td></td><td></td><td></td>{% endif %}
<td class="number">{{ each.seconds | duration }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{% if settings %}
<h2>Settings</h2>
<details><summary>{{ settings | length }} settings</summary>
<div class="wide"><table>
{% for key, value in settings %}
<tr><th>{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div></details>
{% endif %}
<p class="quiet">{{ versions }}</p>
</body>
</html>
"""
