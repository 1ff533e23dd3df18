// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func TestOptions(t *testing.T) {
	for _, tc := range []struct {
		args string
		want string // of the error
	}{
		{"", ""},
		{"-restarts 1000", ""},
		{"-time 1m -restarts 10 -pods 5 -parallel 4", ""},
		{"-time -1s", "negative"},
		{"-pods 4", "-pods must be more"},
		{"-parallel 0", "-parallel at least 1"},
		{"-start-first 2", "shares"},
		{"now", `unexpected argument "now"`},
	} {
		t.Run(tc.args, func(t *testing.T) {
			var o options
			err := o.parse(strings.Fields(tc.args))
			if (err == nil) != (tc.want == "") || (err != nil && !strings.Contains(err.Error(), tc.want)) {
				t.Fatalf("got %v, want %q", err, tc.want)
			}
			if err == nil && o.time == 0 && o.restarts == 0 {
				t.Error("the run would not end")
			}
		})
	}
}

func TestAttempts(t *testing.T) {
	ended := func(attempt uint32) life {
		return life{id: "x", attempt: attempt, created: 1, started: 1, stopped: 1}
	}
	runs := func(attempt uint32) life { return life{id: "x", attempt: attempt, created: 1, started: 1} }
	for _, tc := range []struct {
		name     string
		lives    []life
		restarts int
		want     string
	}{
		{"none", []life{runs(0)}, 0, ""},
		{"two", []life{ended(0), ended(1), runs(2)}, 2, ""},
		{"a hole", []life{ended(0), ended(1), runs(3)}, 2,
			"attempt 2 was there 0 times; attempts [3] are beyond the restarts"},
		{"a double", []life{ended(0), ended(1), ended(1), runs(2)}, 2,
			"4 containers for 2 restarts; attempt 1 was there 2 times"},
		{"one too many", []life{ended(0), ended(1), runs(2)}, 1,
			"3 containers for 1 restarts; attempt 1 (x) was created, started and stopped 1, 1 and 1 times; attempt 2 " +
				"(x) was created, started and stopped 1, 1 and 0 times; attempts [2] are beyond"},
		{"one too few", []life{runs(0)}, 1,
			"1 containers for 1 restarts; attempt 0 (x) was created, started and stopped 1, 1 and 0 times; attempt 1 " +
				"was there 0 times"},
		{"both run", []life{runs(0), runs(1)}, 1, "attempt 0 (x) was created, started and stopped 1, 1 and 0 times"},
		{"never started", []life{ended(0), {id: "x", attempt: 1, created: 1}}, 1,
			"attempt 1 (x) was created, started and stopped 1, 0 and 0 times"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := attempts(tc.lives, tc.restarts)
			got := ""
			if err != nil {
				got = strings.ReplaceAll(err.Error(), "\n", "; ")
			}
			if (got == "") != (tc.want == "") || !strings.Contains(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestLedger(t *testing.T) {
	l := newLedger()
	statuses := []*runtimeapi.ContainerStatus{
		{Id: "b", Metadata: &runtimeapi.ContainerMetadata{Name: "app", Attempt: 1},
			Labels: map[string]string{labelPodUID: "u", labelContainer: "app"}},
		{Id: "a", Metadata: &runtimeapi.ContainerMetadata{Name: "app"},
			Labels: map[string]string{labelPodUID: "u", labelContainer: "app"}},
	}
	for _, e := range []struct {
		id   string
		what runtimeapi.ContainerEventType
	}{
		{"sandbox", runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT},
		{"a", runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT},
		{"a", runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT},
		{"b", runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT},
		{"a", runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT},
		{"b", runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT},
	} {
		l.note(&runtimeapi.ContainerEventResponse{ContainerId: e.id, ContainerEventType: e.what,
			ContainersStatuses: statuses})
	}
	// The status of a container that is gone is not sent.
	l.note(&runtimeapi.ContainerEventResponse{ContainerId: "a",
		ContainerEventType: runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT})
	lives, err := l.bySlot()
	if err != nil || len(lives) != 1 || len(lives["u/app"]) != 2 {
		t.Fatalf("lives are %+v, %v", lives, err)
	}
	if err := attempts(lives["u/app"], 1); err != nil {
		t.Error(err)
	}
	if a := lives["u/app"][0]; a.id != "a" || a.deleted != 1 {
		t.Errorf("the first one is %+v", a)
	}
}

func TestChain(t *testing.T) {
	op := func(attempt uint32, incumbent, successor string) *restart {
		return &restart{op: &opsv1.ContainerOperation{Attempt: attempt, IncumbentId: incumbent, SuccessorId: successor,
			Phase: opsv1.Phase_PHASE_SUCCEEDED}}
	}
	for _, tc := range []struct {
		name string
		ops  []*restart
		ok   bool
		end  string
	}{
		{"none", nil, true, "a"},
		{"in order", []*restart{op(1, "a", "b"), op(2, "b", "c")}, true, "c"},
		{"a pair, the second first", []*restart{op(2, "b", "c"), op(1, "a", "b")}, true, "c"},
		{"unknown end", []*restart{op(1, "a", "b"), {err: errors.New("lost")}}, true, "b"},
		{"kubelet was between", []*restart{op(1, "a", "b"), op(3, "x", "c")}, false, "c"},
		{"another incumbent", []*restart{op(1, "a", "b"), op(2, "a", "c")}, false, "c"},
		{"an attempt twice", []*restart{op(1, "a", "b"), op(1, "a", "c")}, false, "b"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &slot{pod: &pod{name: "p"}, first: "a", restarts: tc.ops}
			if err := chain(s); (err == nil) != tc.ok {
				t.Errorf("got %v", err)
			}
			if got := s.incumbent(); got != tc.end {
				t.Errorf("the incumbent is %s, want %s", got, tc.end)
			}
		})
	}
}

// One client's requests as they come in, at seconds since the start; processes are named by when
// they began.
func TestClientNotes(t *testing.T) {
	zero := time.Unix(1_700_000_000, 0)
	at := func(s int) time.Time { return zero.Add(time.Duration(s) * time.Second) }
	down := errors.New("connection refused")
	type step struct {
		do       string // open, overlap or shut a window; else a request
		sent     int
		received int
		began    int
		err      error
	}
	for _, tc := range []struct {
		name       string
		steps      []step
		violations string
		want       traffic
		processes  int
	}{
		{"calm", []step{{sent: 2, received: 3, began: 1}, {sent: 4, received: 5, began: 1}}, "",
			traffic{Answered: 2}, 1},
		{"not answered in calm", []step{{sent: 2, received: 3, began: 1}, {sent: 4, received: 5, err: down}},
			"connection refused", traffic{Answered: 1, UnansweredCalm: 1}, 1},
		{"a restart", []step{{sent: 2, received: 3, began: 1}, {do: "open"}, {sent: 4, received: 5, err: down},
			{sent: 8, received: 9, began: 7}, {do: "shut"}, {sent: 10, received: 11, began: 7}},
			"", traffic{Answered: 3, UnansweredStopFirst: 1}, 2},
		{"both processes at a time",
			[]step{{sent: 2, received: 3, began: 1}, {do: "open"}, {sent: 8, received: 9, began: 7},
				{sent: 10, received: 11, began: 1}, {do: "shut"}},
			"the process of", traffic{Answered: 3}, 2},
		{"an answer that was under way",
			[]step{{sent: 2, received: 3, began: 1}, {do: "open"}, {sent: 8, received: 9, began: 7},
				{sent: 6, received: 10, began: 1}, {do: "shut"}},
			"", traffic{Answered: 3}, 2},
		{"both with StartFirst",
			[]step{{do: "overlap"}, {sent: 2, received: 3, began: 1}, {sent: 8, received: 9, began: 7},
				{sent: 10, received: 11, began: 1}, {sent: 12, received: 13, err: down}, {do: "shut"}},
			"", traffic{Answered: 3, UnansweredStartFirst: 1}, 2},
		{"the old one after StartFirst", []step{{do: "overlap"}, {sent: 8, received: 9, began: 7}, {do: "shut"},
			{sent: 10, received: 11, began: 1}},
			"the process of", traffic{Answered: 2}, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newClient("http://pod/")
			for _, s := range tc.steps {
				switch s.do {
				case "open", "overlap":
					c.open(s.do == "overlap")
				case "shut":
					c.shut()
				default:
					c.note(c.current(), at(s.sent), at(s.received), at(s.began), s.err)
				}
			}
			got, processes, violations, _ := c.state()
			if got != tc.want || processes != tc.processes {
				t.Errorf("got %+v of %d processes, want %+v of %d", got, processes, tc.want, tc.processes)
			}
			text := strings.Join(violations, "; ")
			if (text == "") != (tc.violations == "") || !strings.Contains(text, tc.violations) {
				t.Errorf("violations are %q, want %q", text, tc.violations)
			}
		})
	}
}

func TestSilence(t *testing.T) {
	zero := time.Unix(1_700_000_000, 0)
	c := newClient("http://pod/")
	answer := func(ms int) {
		moment := zero.Add(time.Duration(ms) * time.Millisecond)
		c.note(c.current(), moment, moment, zero, nil)
	}
	answer(0)
	answer(1000)
	c.open(false)
	answer(1010)
	c.note(c.current(), zero, zero, zero, errors.New("refused"))
	answer(1100)
	answer(1110)
	if w := c.shut(); w.longest != 90*time.Millisecond || w.failed != 1 {
		t.Errorf("silence of %s with %d failed requests, want 90ms and 1", w.longest, w.failed)
	}
}

// The last process of a pair is told from the first one by the middle of their starts.
func TestLatest(t *testing.T) {
	before := time.Unix(100, 0)
	s, other := &slot{}, &slot{}
	started := func(s *slot, sec int64) *restart {
		return &restart{slot: s, op: &opsv1.ContainerOperation{StartTime: timestamppb.New(time.Unix(sec, 0))}}
	}
	if got := latest(before, s, []*restart{started(s, 110), started(other, 120)}); !got.Equal(before) {
		t.Errorf("one restart: %s", got)
	}
	if got := latest(before, s, []*restart{started(s, 120), started(s, 110)}); !got.Equal(time.Unix(115, 0)) {
		t.Errorf("a pair: %s", got)
	}
}

func TestFlat(t *testing.T) {
	series := func(n int, f func(i int) float64) (out []sample) {
		for i := range n {
			out = append(out, sample{RSS: f(i)})
		}
		return out
	}
	for _, tc := range []struct {
		name    string
		samples []sample
		ok      bool
	}{
		{"constant", series(40, func(int) float64 { return 20 }), true},
		{"grows as it warms up", series(40, func(i int) float64 { return min(20, float64(10+i)) }), true},
		{"leaks", series(40, func(i int) float64 { return 20 + float64(i)/2 }), false},
		{"one peak at the end", append(series(39, func(int) float64 { return 20 }), sample{RSS: 100}), true},
		{"falls", series(40, func(i int) float64 { return float64(40 - i) }), true},
		{"too few", series(fewSamples-1, func(i int) float64 { return float64(100 * i) }), true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			j := &judgement{}
			j.flat("memory", tc.samples, func(s sample) float64 { return s.RSS }, 0.1, 3, "%.1f → %.1f")
			if got := j.checks[0]; got.OK != tc.ok {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func TestMetrics(t *testing.T) {
	m, err := parseMetrics(strings.NewReader(`# HELP criproxy_calls_total CRI calls answered.
# TYPE criproxy_calls_total counter
criproxy_calls_total{code="OK",method="/runtime.v1.RuntimeService/StopContainer"} 3
criproxy_calls_total{code="NotFound",method="/runtime.v1.RuntimeService/StopContainer"} 1
criproxy_calls_total{code="OK",method="/runtime.v1.RuntimeService/StopPodSandbox"} 5
process_resident_memory_bytes 2.4e+07
criproxy_interceptor_faults_total{method="a b"} 2
criproxy_interceptor_faults_total{method="c"} 1
`))
	if err != nil {
		t.Fatal(err)
	}
	if got := calls(m, "StopContainer"); got != 4 {
		t.Errorf("%.0f stops", got)
	}
	if got := m["process_resident_memory_bytes"]; got != 2.4e7 {
		t.Errorf("%f bytes", got)
	}
	if got := sum(m, "criproxy_interceptor_faults_total"); got != 3 {
		t.Errorf("%.0f faults", got)
	}
	for _, bad := range []string{"alone\n", "name x\n"} {
		if _, err := parseMetrics(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// A run commands exactly as many restarts as asked for, whatever it chooses.
func TestTakeEndsAtTheCount(t *testing.T) {
	for seed := range uint64(50) {
		r := &restarter{soak: &soak{o: options{startFirst: 0.5, requests: 0.15}}, rand: rand.New(rand.NewPCG(seed, 0)),
			left: 101}
		for i := range 5 {
			p := &pod{name: podName(i), shared: shared(i)}
			for range 1 + i%2 {
				p.slots = append(p.slots, &slot{pod: p})
			}
			r.idle = append(r.idle, p)
		}
		n := 0
		for p, pl := r.take(); p != nil; p, pl = r.take() {
			n += pl.restarts()
			if pl.order == opsv1.Order_ORDER_START_FIRST && !p.shared {
				t.Fatal("StartFirst in a pod whose port is not shared")
			}
			r.giveBack(p, nil)
		}
		if n != 101 {
			t.Fatalf("seed %d: %d restarts", seed, n)
		}
	}
}

func TestPrint(t *testing.T) {
	r := &result{Restarts: 2, Seconds: 1,
		Checks: []check{{Name: "good", OK: true}, {Name: "bad", Faults: make([]string, mostFaults+2)}},
		Groups: []group{{Order: "StopFirst", Method: "gate"}}}
	var b strings.Builder
	r.print(&b)
	for _, want := range []string{"StopFirst", "ok      good", "FAILED  bad", "and 2 more"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, b.String())
		}
	}
	if r.passed() {
		t.Error("passed with a failed check")
	}
	newScreen(io.Discard).progress(0.5, "no terminal")
}
