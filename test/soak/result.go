// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// result is the whole outcome.
type result struct {
	Time      time.Time `json:"time"`
	Go        string    `json:"go"`
	Kernel    string    `json:"kernel"`
	CPUs      int       `json:"cpus"`
	LoadAfter string    `json:"loadAfter"`
	Seed      uint64    `json:"seed"`
	Seconds   float64   `json:"seconds"`

	Pods       int      `json:"pods"`
	Containers int      `json:"containers"`
	Restarts   int      `json:"restarts"`
	Parallel   int      `json:"parallel"`
	Groups     []group  `json:"groups"`
	Traffic    traffic  `json:"traffic"`
	Processes  int      `json:"processes"`
	Warnings   []string `json:"warnings,omitempty"`
	Checks     []check  `json:"checks"`
	Second     sample   `json:"secondQuarter"` // medians
	Last       sample   `json:"lastQuarter"`
	Samples    []sample `json:"samples"`
	Via        []via    `json:"via"`
}

// via is the restarts of one way to command them. Times are in milliseconds, from the command to
// its end.
type via struct {
	Name     string  `json:"name"`
	Restarts int     `json:"restarts"`
	TookP50  float64 `json:"tookP50"`
	TookP95  float64 `json:"tookP95"`
}

// group is the restarts of one order and method. Times are in milliseconds.
type group struct {
	Order    string `json:"order"`
	Method   string `json:"method"`
	Restarts int    `json:"restarts"`
	// Took is the time of commands on the admin socket, pairs left out: the second one waits for
	// the first.
	TookP50 float64 `json:"tookP50"`
	TookP95 float64 `json:"tookP95"`
	// Gap is from the incumbent's exit to the successor's start, as the operation reports it; with
	// StartFirst there is none.
	GapP50 float64 `json:"gapP50,omitempty"`
	GapP95 float64 `json:"gapP95,omitempty"`
	GapMax float64 `json:"gapMax,omitempty"`
	// Silence is the longest time between two answers around a restart, with a request every 10 ms.
	SilenceP50 float64 `json:"silenceP50"`
	SilenceP95 float64 `json:"silenceP95"`
	SilenceMax float64 `json:"silenceMax"`
	// Failed is how many requests failed.
	Failed int `json:"failedRequests"`
}

// mostSamples is how many samples are written.
const mostSamples = 60

func (s *soak) result(checks []check, t traffic, processes int, samples []sample) *result {
	r := &result{
		Time: time.Now().UTC(), Go: runtime.Version(), Kernel: oneLine("/proc/sys/kernel/osrelease"),
		CPUs: runtime.NumCPU(), LoadAfter: oneLine("/proc/loadavg"),
		Seed: s.o.seed, Seconds: s.took.Seconds(), Pods: len(s.pods), Containers: len(s.slots()),
		Parallel: s.o.parallel,
		Traffic:  t, Processes: processes, Checks: checks,
	}
	type key struct{ order, method string }
	groups, ways := map[key][]*restart{}, map[string][]float64{}
	for _, sl := range s.slots() {
		for _, x := range sl.commanded() {
			r.Restarts++
			ways[x.via] = append(ways[x.via], ms(x.took))
			k := key{"StopFirst", x.op.GetMethod()}
			if x.order == opsv1.Order_ORDER_START_FIRST {
				k.order = "StartFirst"
			}
			groups[k] = append(groups[k], x)
			for _, w := range x.op.GetWarnings() {
				r.Warnings = append(r.Warnings, fmt.Sprintf("%s, operation %s: %s", sl, x.uid, w))
			}
		}
	}
	for _, way := range []string{viaOps, viaRepeated, viaPair, viaRequest} {
		r.Via = append(r.Via, via{way, len(ways[way]), quantile(ways[way], 0.5), quantile(ways[way], 0.95)})
	}
	for k, all := range groups {
		g := group{Order: k.order, Method: k.method, Restarts: len(all)}
		var took, gap, silence []float64
		for _, x := range all {
			if x.via == viaOps || x.via == viaRepeated {
				took = append(took, ms(x.took))
			}
			if x.op.GetGap() != nil && x.order != opsv1.Order_ORDER_START_FIRST {
				gap = append(gap, ms(x.op.GetGap().AsDuration()))
			}
			if x.via != viaPair { // a pair's is that of both
				silence = append(silence, ms(x.silence))
				g.Failed += x.failed
			}
		}
		g.TookP50, g.TookP95 = quantile(took, 0.5), quantile(took, 0.95)
		g.GapP50, g.GapP95, g.GapMax = quantile(gap, 0.5), quantile(gap, 0.95), quantile(gap, 1)
		g.SilenceP50, g.SilenceP95, g.SilenceMax = quantile(silence, 0.5), quantile(silence, 0.95), quantile(silence, 1)
		r.Groups = append(r.Groups, g)
	}
	slices.SortFunc(r.Groups, func(a, b group) int { return strings.Compare(a.Order+a.Method, b.Order+b.Method) })
	if len(samples) >= fewSamples {
		r.Second, r.Last = typical(samples, 1), typical(samples, 3)
	}
	every := max(1, (len(samples)+mostSamples-1)/mostSamples)
	for i := 0; i < len(samples); i += every {
		r.Samples = append(r.Samples, samples[i])
	}
	return r
}

// typical returns the medians of a quarter, from 0 to 3.
func typical(samples []sample, quarter int) sample {
	q := len(samples) / 4
	part := samples[quarter*q : (quarter+1)*q]
	if quarter == 3 {
		part = samples[len(samples)-q:]
	}
	m := func(value func(sample) float64) float64 { return median(part, value) }
	return sample{
		Seconds:       m(func(s sample) float64 { return s.Seconds }),
		Restarts:      int(m(func(s sample) float64 { return float64(s.Restarts) })),
		RSS:           m(func(s sample) float64 { return s.RSS }),
		Anonymous:     m(func(s sample) float64 { return s.Anonymous }),
		Heap:          m(func(s sample) float64 { return s.Heap }),
		Live:          m(func(s sample) float64 { return s.Live }),
		Kept:          int(m(func(s sample) float64 { return float64(s.Kept) })),
		FDs:           m(func(s sample) float64 { return s.FDs }),
		Goroutines:    m(func(s sample) float64 { return s.Goroutines }),
		Threads:       int(m(func(s sample) float64 { return float64(s.Threads) })),
		Journal:       int64(m(func(s sample) float64 { return float64(s.Journal) })),
		Records:       int64(m(func(s sample) float64 { return float64(s.Records) })),
		Gates:         int(m(func(s sample) float64 { return float64(s.Gates) })),
		Recorded:      m(func(s sample) float64 { return s.Recorded }),
		Active:        m(func(s sample) float64 { return s.Active }),
		Running:       int(m(func(s sample) float64 { return float64(s.Running) })),
		Exited:        int(m(func(s sample) float64 { return float64(s.Exited) })),
		Removed:       m(func(s sample) float64 { return s.Removed }),
		Shims:         int(m(func(s sample) float64 { return float64(s.Shims) })),
		Mounts:        int(m(func(s sample) float64 { return float64(s.Mounts) })),
		KubeletRSS:    m(func(s sample) float64 { return s.KubeletRSS }),
		ContainerdRSS: m(func(s sample) float64 { return s.ContainerdRSS }),
	}
}

func ms(d time.Duration) float64 {
	return math.Round(float64(d)/float64(time.Millisecond)*10) / 10
}

func oneLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

func (r *result) passed() bool {
	return !slices.ContainsFunc(r.Checks, func(c check) bool { return !c.OK })
}

func (r *result) write(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// mostFaults is how many faults of one check are printed; the file has all.
const mostFaults = 15

func (r *result) print(w io.Writer) {
	fmt.Fprintf(w, "\n%d restarts of %d containers in %d pods in %.0f s, %.1f per second, up to %d at a time; "+
		"commanded: ", r.Restarts, r.Containers, r.Pods, r.Seconds, float64(r.Restarts)/r.Seconds, r.Parallel)
	for _, v := range r.Via {
		fmt.Fprintf(w, "%d %s (p50 %.0f ms, p95 %.0f ms), ", v.Restarts, v.Name, v.TookP50, v.TookP95)
	}
	fmt.Fprintf(w, "seed %d\n\n", r.Seed)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t,
		"order\tmethod\trestarts\ttook p50 ms\tp95\tgap p50 ms\tp95\tmax\tsilence p50 ms\tp95\tmax\tfailed "+
			"requests\t\n")
	for _, g := range r.Groups {
		gap := "\t\t"
		if g.GapMax > 0 {
			gap = fmt.Sprintf("%.1f\t%.1f\t%.1f", g.GapP50, g.GapP95, g.GapMax)
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%.0f\t%.0f\t%s\t%.0f\t%.0f\t%.0f\t%d\t\n", g.Order, g.Method, g.Restarts, g.TookP50,
			g.TookP95, gap, g.SilenceP50, g.SilenceP95, g.SilenceMax, g.Failed)
	}
	_ = t.Flush()
	fmt.Fprintln(w)
	for _, warning := range r.Warnings[:min(len(r.Warnings), mostFaults)] {
		fmt.Fprintf(w, "warning: %s\n", warning)
	}
	for _, c := range r.Checks {
		verdict := "ok    "
		if !c.OK {
			verdict = "FAILED"
		}
		fmt.Fprintf(w, "%s  %s: %s\n", verdict, c.Name, c.Detail)
		for _, f := range c.Faults[:min(len(c.Faults), mostFaults)] {
			fmt.Fprintf(w, "          %s\n", f)
		}
		if more := len(c.Faults) - mostFaults; more > 0 {
			fmt.Fprintf(w, "          and %d more\n", more)
		}
	}
}
