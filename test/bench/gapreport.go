// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"
)

// GapReport is the whole outcome of the command gap. Times are in milliseconds.
type GapReport struct {
	Time     time.Time `json:"time"`
	CPUs     int       `json:"cpus"`
	CPU      string    `json:"cpu"`
	Versions Versions  `json:"versions"`
	// Rounds is how often the ways took turns, each once a round.
	Rounds int `json:"rounds"`
	// PeriodMS is the rhythm of the client that measures gaps, SeriesPeriodMS that for series
	// side by side; PerSecond is the rate of the client that counts failed requests.
	PeriodMS       float64 `json:"client_period_ms"`
	SeriesPeriodMS float64 `json:"side_by_side_client_period_ms"`
	PerSecond      int     `json:"requests_per_second"`
	// AbsentMiB is the size of the image that is not on the node where a way says so.
	AbsentMiB  float64        `json:"absent_image_mib,omitempty"`
	LoadBefore string         `json:"load_before"`
	LoadAfter  string         `json:"load_after"`
	Ways       []*WayResult   `json:"ways"`
	Series     []SeriesResult `json:"series"`
	Goals      []Goal         `json:"goals"`
	// Notes are what went otherwise than meant.
	Notes []string `json:"notes"`
}

// Versions of what was measured.
type Versions struct {
	Go         string `json:"go"`
	Kernel     string `json:"kernel"`
	Kubelet    string `json:"kubelet"`
	Containerd string `json:"containerd"`
	Runc       string `json:"runc"`
	CRIProxy   string `json:"cri_proxy"`
}

// Sample is one restart.
type Sample struct {
	Round int `json:"round"` // from 0
	// Gap is from the last answer of the old process to the first of the new one.
	Gap float64 `json:"gap_ms"`
	// ProcessGap is from the end of the old process to the main function of the new one; below zero
	// when both ran.
	ProcessGap float64 `json:"process_gap_ms"`
	// NodeGap and Method are what the node reports, for ours.
	NodeGap *float64 `json:"node_gap_ms,omitempty"`
	Method  string   `json:"method,omitempty"`
	// Sent and Failed are requests, from a second or two before the restart to a moment after it.
	Sent    int    `json:"sent"`
	Failed  int    `json:"failed"`
	Failure string `json:"failure,omitempty"` // the first one
	// Error is why there is no measurement; the sample then counts nowhere.
	Error string `json:"error,omitempty"`
}

// String returns the sample as a line of progress.
func (s Sample) String() string {
	if s.Error != "" {
		return s.Error
	}
	line := fmt.Sprintf("gap %8.1f ms, process to process %8.1f ms, %d of %d requests failed", s.Gap, s.ProcessGap,
		s.Failed, s.Sent)
	if s.NodeGap != nil {
		line += fmt.Sprintf(", node: %q %.1f ms", s.Method, *s.NodeGap)
	}
	if s.ProcessGap < 0 && s.Failed > 0 {
		line += ", the first with " + s.Failure // there always was a process to answer
	}
	return line
}

// Stats are of sorted values.
type Stats struct {
	Median float64 `json:"median"`
	P90    float64 `json:"p90"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func statsOf(values []float64) Stats {
	if len(values) == 0 {
		return Stats{}
	}
	v := slices.Sorted(slices.Values(values))
	return Stats{Median: quantile(v, 0.5), P90: quantile(v, 0.9), Min: v[0], Max: v[len(v)-1]}
}

// WayResult is one way of restarting.
type WayResult struct {
	Name  string `json:"name"`
	Title string `json:"title"`
	// Expected is the method that the node should use, empty when it is not ours.
	Expected   string `json:"expected_method,omitempty"`
	N          int    `json:"n"`
	Gap        Stats  `json:"gap_ms"`
	ProcessGap Stats  `json:"process_gap_ms"`
	NodeGap    *Stats `json:"node_gap_ms,omitempty"`
	Sent       int    `json:"sent"`
	Failed     int    `json:"failed"`
	// OfKubelet is the median gap divided by that of kubelet alone; 0 when that was not measured.
	OfKubelet float64  `json:"of_kubelet_alone"`
	Samples   []Sample `json:"samples"`
}

func (w *WayResult) add(s Sample) { w.Samples = append(w.Samples, s) }

// of returns a value of all samples that count.
func (w *WayResult) of(value func(Sample) float64) []float64 {
	var all []float64
	for _, s := range w.Samples {
		if s.Error == "" {
			all = append(all, value(s))
		}
	}
	return all
}

// SeriesResult is restarts in a row: Restarts[0] is the first of each series.
type SeriesResult struct {
	Name       string      `json:"name"`
	Title      string      `json:"title"`
	SideBySide bool        `json:"side_by_side"`
	N          int         `json:"n"`
	Restarts   []Stats     `json:"restarts_gap_ms"`
	Samples    [][]float64 `json:"samples_gap_ms"` // by series, then by restart
}

// nth returns the gaps of the nth restart, from 0.
func (s *SeriesResult) nth(n int) []float64 {
	var all []float64
	for _, row := range s.Samples {
		if n < len(row) {
			all = append(all, row[n])
		}
	}
	return all
}

func (r *GapReport) note(format string, args ...any) {
	if note := fmt.Sprintf(format, args...); !slices.Contains(r.Notes, note) {
		progress("note: %s", note)
		r.Notes = append(r.Notes, note)
	}
}

// way returns the result of a way; one that is not measured has no samples.
func (r *GapReport) way(name string) *WayResult {
	for _, w := range r.Ways {
		if w.Name == name {
			return w
		}
	}
	return &WayResult{Name: name}
}

// machine fills in what the run is on.
func (r *GapReport) machine(ctx context.Context, g *gapBench) error {
	node := &corev1.Node{}
	if err := g.api.Get(ctx, kube.ObjectKey{Name: g.bed.NodeName}, node); err != nil {
		return err
	}
	runc, err := exec.CommandContext(ctx, filepath.Join(g.bed.Bin, "runc"), "--version").Output()
	if err != nil {
		return fmt.Errorf("runc --version: %w", err)
	}
	first, _, _ := strings.Cut(string(runc), "\n")
	info := node.Status.NodeInfo
	r.CPUs, r.CPU = runtime.NumCPU(), cpuModel()
	r.Versions.Go, r.Versions.Kernel, r.Versions.Kubelet = runtime.Version(), info.KernelVersion, info.KubeletVersion
	r.Versions.Containerd, r.Versions.Runc = info.ContainerRuntimeVersion, first
	return nil
}

func cpuModel() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

// finish computes everything from the samples.
func (r *GapReport) finish() {
	for _, w := range r.Ways {
		w.N, w.Sent, w.Failed = 0, 0, 0
		var node []float64
		for _, s := range w.Samples {
			if s.Error != "" {
				continue
			}
			w.N, w.Sent, w.Failed = w.N+1, w.Sent+s.Sent, w.Failed+s.Failed
			if s.NodeGap != nil {
				node = append(node, *s.NodeGap)
			}
			if s.Method != w.Expected {
				r.note("%s: the node says that it used method %q", w.Name, s.Method)
			}
		}
		w.Gap = statsOf(w.of(func(s Sample) float64 { return s.Gap }))
		w.ProcessGap = statsOf(w.of(func(s Sample) float64 { return s.ProcessGap }))
		if node != nil {
			stats := statsOf(node)
			w.NodeGap = &stats
		}
	}
	if alone := r.way("kubelet").Gap.Median; alone > 0 {
		for _, w := range r.Ways {
			w.OfKubelet = w.Gap.Median / alone
		}
	}
	for i := range r.Series {
		s := &r.Series[i]
		s.N, s.Restarts = len(s.Samples), nil
		for nth := range seriesLength {
			s.Restarts = append(s.Restarts, statsOf(s.nth(nth)))
		}
	}
	r.judge()
}

// steady is how much longer the fifth restart in a row may take than the first before it counts as
// growth: medians of 20 differ by as much.
const steady = 1.25

// judge compares with what is promised.
func (r *GapReport) judge() {
	r.Goals = nil
	goal := func(name string, value, limit float64) {
		r.Goals = append(r.Goals, Goal{name, value, limit, value <= limit})
	}
	if gate := r.way("gate"); gate.N > 0 {
		goal("gate: median gap, ms", gate.Gap.Median, 15)
		if gate.OfKubelet > 0 {
			goal("gate: median gap, times kubelet's alone", gate.OfKubelet, 1.0/8)
		}
	}
	if absent, present := r.way("upgrade-absent"), r.way("upgrade"); absent.N > 0 && present.N > 0 {
		goal("upgrade: median gap with the image absent, times that with the image present",
			absent.Gap.Median/present.Gap.Median, steady)
	}
	if absent, alone := r.way("upgrade-absent"), r.way("kubelet-absent"); absent.N > 0 && alone.N > 0 {
		goal("upgrade: median gap with the image absent, times kubelet's alone", absent.Gap.Median/alone.Gap.Median,
			1.0/8)
	}
	for _, name := range []string{"overlap", "newest", "upgrade-newest"} {
		if w := r.way(name); w.N > 0 {
			goal(fmt.Sprintf("%s: failed of %d requests", w.Title, w.Sent), float64(w.Failed), 0)
		}
	}
	for _, s := range r.Series {
		if s.Name == "gate" && s.N > 0 {
			goal("gate: median gap of the fifth restart in a row, times the first",
				s.Restarts[seriesLength-1].Median/s.Restarts[0].Median, steady)
		}
	}
}

// print prints tables in Markdown.
func (r *GapReport) print(out io.Writer) {
	fmt.Fprintf(out, "| way | gap, median | p90 | min – max | of kubelet alone | process to process, median | "+
		"requests failed |\n|---|---|---|---|---|---|---|\n")
	for _, w := range r.Ways {
		if w.N == 0 {
			continue
		}
		ratio := "–"
		if w.OfKubelet > 0 {
			ratio = fmt.Sprintf("%.2g ×", w.OfKubelet)
		}
		fmt.Fprintf(out, "| %s | %s | %s | %s – %s | %s | %s | %.3g per restart |\n", w.Title, human(w.Gap.Median),
			human(w.Gap.P90), human(w.Gap.Min), human(w.Gap.Max),
			ratio, human(w.ProcessGap.Median), float64(w.Failed)/float64(w.N))
	}
	if len(r.Series) > 0 {
		fmt.Fprintf(out,
			"\n| in a row: median gap | 1st | 2nd | 3rd | 4th | 5th | n |\n|---|---|---|---|---|---|---|\n")
	}
	for _, s := range r.Series {
		fmt.Fprintf(out, "| %s |", s.Title)
		for _, nth := range s.Restarts {
			fmt.Fprintf(out, " %s |", human(nth.Median))
		}
		fmt.Fprintf(out, " %d |\n", s.N)
	}
	fmt.Fprintln(out)
	for _, w := range r.Ways {
		node := ""
		if w.NodeGap != nil {
			node = ", gap as the node reports it " + human(w.NodeGap.Median)
		}
		fmt.Fprintf(out, "%s: n = %d, %d of %d requests failed%s\n", w.Name, w.N, w.Failed, w.Sent, node)
	}
	v := r.Versions
	fmt.Fprintf(out, "%d CPUs (%s), Linux %s, %s, %s, kubelet %s, cri-proxy %s, %s; %d rounds, load before "+
		"%s, after %s\n\n",
		r.CPUs, r.CPU, v.Kernel, v.Containerd, v.Runc, v.Kubelet, v.CRIProxy, v.Go, r.Rounds, r.LoadBefore, r.LoadAfter)
	for _, n := range r.Notes {
		fmt.Fprintln(out, "note:", n)
	}
	for _, g := range r.Goals {
		met := "met"
		if !g.Met {
			met = "MISSED"
		}
		fmt.Fprintf(out, "%-6s  %.3g (goal ≤ %.4g)  %s\n", met, g.Value, g.Limit, g.Name)
	}
}

// human returns a time with three digits that matter.
func human(ms float64) string {
	switch {
	case ms >= 100_000:
		return fmt.Sprintf("%.0f s", ms/1000)
	case ms >= 10_000:
		return fmt.Sprintf("%.1f s", ms/1000)
	case ms >= 1000:
		return fmt.Sprintf("%.2f s", ms/1000)
	case ms >= 100 || ms <= -100:
		return fmt.Sprintf("%.0f ms", ms)
	default:
		return fmt.Sprintf("%.1f ms", ms)
	}
}
