// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// Measures of the plot in pixels.
const (
	plotWidth  = 960
	plotLeft   = 316 // where the axis begins
	plotRight  = 130 // for the figures
	plotTop    = 34  // of a panel, for its heading
	plotRow    = 30
	plotBottom = 34 // of a panel, for the labels of its axis
	dotRadius  = 3.2
)

// plotStyle has colors that are told apart in light and dark and by color-blind people.
const plotStyle = `
.back { fill: #ffffff; }
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
.heading { font-weight: 600; }
.figure, .tick { font-variant-numeric: tabular-nums; }
.tick { font-size: 11px; fill: #59636e; }
.grid { stroke: #d1d9e0; stroke-width: 1; }
.minor { stroke: #d1d9e0; stroke-width: 1; opacity: .45; }
.ours { fill: #0969da; stroke: #0969da; }
.theirs { fill: #bc4c00; stroke: #bc4c00; }
circle { fill-opacity: .38; stroke: none !important; }
.box { fill-opacity: .13; stroke-width: 1; stroke-opacity: .55; }
.median { stroke-width: 3; }
@media (prefers-color-scheme: dark) {
  .back { fill: #0d1117; }
  text { fill: #e6edf3; }
  .tick { fill: #9198a1; }
  .grid, .minor { stroke: #3d444d; }
  .ours { fill: #4493f8; stroke: #4493f8; }
  .theirs { fill: #f0883e; stroke: #f0883e; }
}
`

// strip is one row of the plot.
type strip struct {
	label  string
	ours   bool
	values []float64 // milliseconds
}

// panel is strips with a heading and an axis.
type panel struct {
	heading string
	strips  []strip
}

func (r *GapReport) panels() []panel {
	ways := panel{heading: "Time without an answer at a restart (each dot is one restart, the box the middle half, " +
		"the bar the median)"}
	for _, w := range r.Ways {
		if w.N > 0 {
			ways.strips = append(ways.strips,
				strip{w.Title, w.Expected != "", w.of(func(s Sample) float64 { return s.Gap })})
		}
	}
	row := panel{heading: "Five restarts in a row"}
	for _, s := range r.Series {
		for n := range s.Restarts {
			label := fmt.Sprintf("%d%s", n+1, [...]string{"st", "nd", "rd", "th", "th"}[n])
			if n == 0 {
				label = s.Title + ", 1st"
			}
			row.strips = append(row.strips, strip{label, r.way(s.Name).Expected != "", s.nth(n)})
		}
	}
	panels := []panel{ways}
	if len(row.strips) > 0 {
		panels = append(panels, row)
	}
	return panels
}

// axis maps milliseconds to pixels, in decades.
type axis struct{ from, to float64 } // exponents of ten

func (a axis) x(ms float64) float64 {
	at := (math.Log10(max(ms, math.Pow(10, a.from))) - a.from) / (a.to - a.from)
	return plotLeft + at*(plotWidth-plotLeft-plotRight)
}

func axisOf(panels []panel) axis {
	low, high := math.Inf(1), math.Inf(-1)
	for _, p := range panels {
		for _, s := range p.strips {
			for _, v := range s.values {
				low, high = min(low, max(v, 0.1)), max(high, v)
			}
		}
	}
	if math.IsInf(low, 1) {
		return axis{0, 1}
	}
	a := axis{math.Floor(math.Log10(low)), math.Ceil(math.Log10(max(high, 0.2)))}
	a.to = max(a.to, a.from+1)
	return a
}

// svg draws the gaps on one logarithmic axis.
func (r *GapReport) svg() string {
	panels := r.panels()
	a := axisOf(panels)
	height := 12
	for _, p := range panels {
		height += plotTop + plotRow*len(p.strips) + plotBottom
	}
	var b strings.Builder
	fmt.Fprintf(&b,
		`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" `+
			`role="img" aria-label="Time without an answer at a restart, by way of restarting, `+
			`on a logarithmic scale">`+"\n", plotWidth, height, plotWidth, height)
	fmt.Fprintf(&b, "<style>%s</style>\n", plotStyle)
	// Of its own, as the page around need not follow the reader's choice of light or dark.
	fmt.Fprintf(&b, `<rect class="back" width="%d" height="%d" rx="6"/>`+"\n", plotWidth, height)
	top := 12
	for _, p := range panels {
		p.draw(&b, a, top)
		top += plotTop + plotRow*len(p.strips) + plotBottom
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func (p panel) draw(b *strings.Builder, a axis, top int) {
	text := func(class, anchor string, x, y float64, s string) {
		fmt.Fprintf(b, `<text class="%s" text-anchor="%s" x="%.1f" y="%.1f">%s</text>`+"\n", class, anchor, x, y,
			html.EscapeString(s))
	}
	text("heading", "start", 12, float64(top+14), p.heading)
	first, last := float64(top+plotTop), float64(top+plotTop+plotRow*len(p.strips))
	for e := a.from; e <= a.to; e++ {
		x := a.x(math.Pow(10, e))
		fmt.Fprintf(b, `<line class="grid" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`+"\n", x, x, first, last)
		text("tick", "middle", x, last+16, decade(e))
		for _, m := range []float64{2, 5} {
			if x := a.x(m * math.Pow(10, e)); e < a.to {
				fmt.Fprintf(b, `<line class="minor" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`+"\n", x, x, first, last)
			}
		}
	}
	for i, s := range p.strips {
		if len(s.values) == 0 {
			continue
		}
		y := first + plotRow*(float64(i)+0.5)
		class := "theirs"
		if s.ours {
			class = "ours"
		}
		stats := statsOf(s.values)
		q1, q3 := quartiles(s.values)
		fmt.Fprintf(b, `<g class="%s"><title>%s: median %s, %s to %s, n = %d</title>`+"\n", class,
			html.EscapeString(s.label), human(stats.Median), human(stats.Min), human(stats.Max), len(s.values))
		fmt.Fprintf(b, `<rect class="box" x="%.1f" y="%.1f" width="%.1f" height="%d" rx="2"/>`+"\n", a.x(q1), y-9,
			max(a.x(q3)-a.x(q1), 1), 18)
		for j, v := range s.values {
			// Dots on top of each other are told apart by their height, which means nothing.
			fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="%.1f"/>`+"\n", a.x(v), y+float64(j*7%11-5), dotRadius)
		}
		x := a.x(stats.Median)
		fmt.Fprintf(b, `<line class="median" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/></g>`+"\n", x, x, y-10, y+10)
		text("label", "end", plotLeft-14, y+4.5, s.label)
		text("figure", "start", plotWidth-plotRight+14, y+4.5, human(stats.Median))
	}
}

func quartiles(values []float64) (q1, q3 float64) {
	v := slices.Sorted(slices.Values(values))
	return quantile(v, 0.25), quantile(v, 0.75)
}

// decade names a power of ten milliseconds.
func decade(e float64) string {
	ms := math.Pow(10, e)
	if ms >= 1000 {
		return fmt.Sprintf("%g s", ms/1000)
	}
	return fmt.Sprintf("%g ms", ms)
}
