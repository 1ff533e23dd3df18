// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type options struct {
	out      string
	only     string
	criProxy string
	rounds   int
	scale    float64
}

// benchCase is one kind of load.
type benchCase struct {
	name  string
	batch batch
}

func cases() []benchCase {
	return []benchCase{
		{"ContainerStatus 1.4 KB", batch{Callers: 1, Calls: 400}},
		{"ContainerStatus, 1 ms apart", batch{Callers: 1, Calls: 100, Pause: time.Millisecond}},
		{"ListContainers 100 (140 KB)", batch{Callers: 1, Calls: 40, List: 100}},
		{"ListContainers 1000 (1.4 MB)", batch{Callers: 1, Calls: 8, List: 1000}},
		{"32 callers, ContainerStatus", batch{Callers: 32, Calls: 3200}},
	}
}

// The variants. The direct one comes first: the others are compared with it.
var variants = []string{"direct", "relay", "cri-proxy"}

// Result is one case by one variant. Times are in microseconds.
type Result struct {
	Case    string  `json:"case"`
	Variant string  `json:"variant"`
	Calls   int     `json:"calls"`
	P50     float64 `json:"p50_us"`
	P99     float64 `json:"p99_us"`
	// Added is the median over the rounds of this variant's p50 above the direct
	// one's of the same round.
	Added     float64 `json:"added_p50_us"`
	AddedLow  float64 `json:"added_p50_us_q1"` // first quartile of the rounds
	AddedHigh float64 `json:"added_p50_us_q3"` // third
	PerSecond float64 `json:"calls_per_second"`
	CPU       float64 `json:"proxy_cpu_us_per_call"` // of the process between, 0 for direct
}

// Goal is a promise and what became of it.
type Goal struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Limit float64 `json:"limit"`
	Met   bool    `json:"met"`
}

// Report is the whole outcome.
type Report struct {
	Time       time.Time `json:"time"`
	Go         string    `json:"go"`
	CPUs       int       `json:"cpus"`
	LoadBefore string    `json:"load_before"`
	LoadAfter  string    `json:"load_after"`
	Rounds     int       `json:"rounds"`
	Results    []Result  `json:"results"`
	IdleOf     string    `json:"idle_of"`
	IdleRSS    float64   `json:"idle_rss_mib"`
	IdleAnon   float64   `json:"idle_anon_mib"` // without the pages of the binary
	Goals      []Goal    `json:"goals"`
}

func passthrough(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	socket := func(name string) string { return filepath.Join(dir, name) }

	r := Report{Time: time.Now().UTC(), Go: runtime.Version(), CPUs: runtime.NumCPU(), LoadBefore: load(),
		Rounds: o.rounds}
	backend, err := start(ctx, "runtime", socket("runtime"))
	if err != nil {
		return err
	}
	defer backend.stop()
	between := make(map[string]*process)
	clients := make(map[string]*process)
	defer func() {
		for _, m := range []map[string]*process{clients, between} {
			for _, p := range m {
				p.stop()
			}
		}
	}()
	for variant, role := range map[string]string{"relay": "relay", "cri-proxy": "proxy"} {
		p, err := start(ctx, role, socket(variant), socket("runtime"))
		if err != nil {
			return err
		}
		between[variant] = p
	}
	for _, variant := range variants {
		at := socket(variant)
		if variant == "direct" {
			at = socket("runtime")
		}
		p, err := start(ctx, "client", at)
		if err != nil {
			return err
		}
		clients[variant] = p
	}

	for _, c := range cases() {
		if !strings.Contains(c.name, o.only) {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s: %d rounds\n", c.name, o.rounds)
		c.batch.Calls = max(c.batch.Callers, int(float64(c.batch.Calls)*o.scale))
		results, err := runCase(c, o.rounds, clients, between)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		r.Results = append(r.Results, results...)
	}
	if err := r.measureIdle(ctx, o.criProxy, dir, between["cri-proxy"]); err != nil {
		return fmt.Errorf("idle memory: %w", err)
	}
	r.LoadAfter = load()
	r.judge()
	r.print(os.Stdout)
	if o.out == "" {
		return nil
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(o.out, append(b, '\n'), 0o644)
}

// runCase runs the variants in turns, starting with another one each round.
func runCase(c benchCase, rounds int, clients, between map[string]*process) ([]Result, error) {
	all := make(map[string][]time.Duration)
	p50s := make(map[string][]float64)
	wall, cpu := make(map[string]time.Duration), make(map[string]time.Duration)
	for round := -1; round < rounds; round++ { // the first one warms up
		for i := range variants {
			variant := variants[(i+max(round, 0))%len(variants)]
			p := between[variant]
			var before, after used
			var err error
			if p != nil {
				if before, err = p.used(); err != nil {
					return nil, err
				}
			}
			var t times
			if err := clients[variant].ask(c.batch, &t); err != nil {
				return nil, err
			}
			if p != nil {
				if after, err = p.used(); err != nil {
					return nil, err
				}
			}
			if round < 0 {
				continue
			}
			slices.Sort(t.Calls)
			p50s[variant] = append(p50s[variant], micros(quantile(t.Calls, 0.5)))
			all[variant] = append(all[variant], t.Calls...)
			wall[variant] += t.Wall
			cpu[variant] += after.CPU - before.CPU
		}
	}
	var results []Result
	for _, variant := range variants {
		calls := all[variant]
		slices.Sort(calls)
		added := make([]float64, rounds)
		for i := range added {
			added[i] = p50s[variant][i] - p50s["direct"][i]
		}
		slices.Sort(added)
		results = append(results, Result{
			Case: c.name, Variant: variant, Calls: len(calls),
			P50: micros(quantile(calls, 0.5)), P99: micros(quantile(calls, 0.99)),
			Added: quantile(added, 0.5), AddedLow: quantile(added, 0.25), AddedHigh: quantile(added, 0.75),
			PerSecond: float64(len(calls)) / wall[variant].Seconds(),
			CPU:       micros(cpu[variant]) / float64(len(calls)),
		})
	}
	return results, nil
}

// quantile of sorted values.
func quantile[T any](sorted []T, q float64) T { return sorted[int(q*float64(len(sorted)-1))] }

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

// settle is how long a process is left alone before its memory counts as idle:
// longer than the two minutes would be better for the runtime's scavenger, but
// what matters is what stays after start and a few calls.
const settle = 3 * time.Second

// measureIdle measures the memory of cri-proxy after it has served a few calls.
func (r *Report) measureIdle(ctx context.Context, binary, dir string, own *process) error {
	r.IdleOf = "the benchmark's own proxy process"
	pid := own.cmd.Process.Pid
	if binary != "" {
		r.IdleOf = "cri-proxy serve"
		listen := filepath.Join(dir, "serve")
		cmd := exec.CommandContext(ctx, binary, "serve", "--listen", listen, "--runtime-endpoint",
			"unix://"+filepath.Join(dir, "runtime"),
			"--state-dir", filepath.Join(dir, "state"), "--admin-socket", filepath.Join(dir, "admin"), "--log-level",
			"error")
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
		pid = cmd.Process.Pid
		if err := firstCall(ctx, listen); err != nil {
			return err
		}
	}
	select {
	case <-time.After(settle):
	case <-ctx.Done():
		return ctx.Err()
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err
	}
	r.IdleRSS, r.IdleAnon = field(string(b), "VmRSS:"), field(string(b), "RssAnon:")
	return nil
}

// firstCall waits until the proxy at the socket answers.
func firstCall(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = runtimeapi.NewRuntimeServiceClient(conn).
		Version(ctx, &runtimeapi.VersionRequest{}, grpc.WaitForReady(true))
	return err
}

// field reads a value in kB from /proc/PID/status and returns MiB.
func field(status, name string) float64 {
	for line := range strings.Lines(status) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == name {
			kb, _ := strconv.ParseFloat(f[1], 64)
			return kb / 1024
		}
	}
	return 0
}

func (r *Report) result(c, variant string) Result {
	for _, x := range r.Results {
		if x.Case == c && x.Variant == variant {
			return x
		}
	}
	return Result{}
}

// judge compares with what is promised. A ratio to a relay that is lost in the
// noise says nothing: it counts as missed, run again on a quieter machine.
func (r *Report) judge() {
	all := cases()
	goal := func(name string, value, limit float64) {
		r.Goals = append(r.Goals, Goal{name, value, limit, value >= 0 && value <= limit})
	}
	if small := all[0].name; r.result(small, "direct").Calls > 0 {
		times := -1.0
		if relay := r.result(small, "relay").Added; relay > 0 {
			times = max(0, r.result(small, "cri-proxy").Added/relay)
		}
		goal(small+": added p50, times the relay's", times, 1.5)
	}
	if big := all[3].name; r.result(big, "direct").Calls > 0 {
		goal(big+": added p50, % of direct", max(0, 100*r.result(big, "cri-proxy").Added/r.result(big, "direct").P50),
			5)
	}
	goal("idle RSS of "+r.IdleOf+", MiB", r.IdleRSS, 25)
}

func (r *Report) print(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "case\tvariant\tp50 µs\tp99 µs\tadded p50 µs\t(quartiles)\t× relay\tof direct\tcalls/s\tproxy "+
		"CPU µs/call\t\n")
	for _, x := range r.Results {
		direct, relay := r.result(x.Case, "direct"), r.result(x.Case, "relay")
		if x.Variant == "direct" {
			fmt.Fprintf(t, "%s\t%s\t%.0f\t%.0f\t\t\t\t\t%.0f\t\t\n", x.Case, x.Variant, x.P50, x.P99, x.PerSecond)
			continue
		}
		fmt.Fprintf(t, "\t%s\t%.0f\t%.0f\t%+.0f\t%+.0f…%+.0f\t%.2f\t%+.1f %%\t%.0f\t%.1f\t\n", x.Variant, x.P50, x.P99,
			x.Added, x.AddedLow, x.AddedHigh, x.Added/relay.Added, 100*x.Added/direct.P50, x.PerSecond, x.CPU)
	}
	_ = t.Flush()
	fmt.Fprintf(w, "\nidle memory of %s: RSS %.1f MiB, of that anonymous %.1f MiB\n", r.IdleOf, r.IdleRSS, r.IdleAnon)
	fmt.Fprintf(w, "%s, %d CPUs, %d rounds, load before %s, after %s\n\n", r.Go, r.CPUs, r.Rounds,
		r.LoadBefore, r.LoadAfter)
	for _, g := range r.Goals {
		met := "met"
		if !g.Met {
			met = "MISSED"
		}
		fmt.Fprintf(w, "%-6s  %.2f (goal ≤ %g)  %s\n", met, g.Value, g.Limit, g.Name)
	}
}
