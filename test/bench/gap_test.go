// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/xml"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/test/address"
)

// serve answers as the app image does, as a process that has started at the given time.
func serve(t *testing.T, at, start string) *httptest.Server {
	t.Helper()
	l := address.Listen(t, at)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"version":"1","startTime":"`+start+`"}`)
	}))
	_ = s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// until waits for a count of requests.
func until(r *requests, cond func(sent, failed int) bool) {
	for {
		if sent, failed, _ := r.result(); cond(sent, failed) {
			return
		}
		time.Sleep(time.Millisecond) // polling another goroutine
	}
}

// TestClientsSeeARestart has both clients watch a server go away and another come in its place,
// first at the same address and then elsewhere.
func TestClientsSeeARestart(t *testing.T) {
	ctx, began := t.Context(), time.Now()
	here := address.Reserve(t)
	first := serve(t, here, "first")
	eye := startWatcher(ctx, here, time.Millisecond)
	defer eye.stop()
	load := startRequests(ctx, here, 500)
	defer load.stop()
	other := func(than, want string) {
		t.Helper()
		if got, err := eye.other(ctx, than); err != nil || got != want {
			t.Fatalf("after %q answers %q, %v; want %q", than, got, err, want)
		}
	}
	other("", "first")

	until(load, func(sent, failed int) bool { return sent > failed })
	first.CloseClientConnections()
	first.Close()
	until(load, func(_, failed int) bool { return failed > 0 })
	serve(t, here, "second")
	other("first", "second")
	if gap, all := eye.gap("first", "second"), time.Since(began); gap <= 0 || gap >= all {
		t.Errorf("gap %s, in a test that has taken %s so far", gap, all)
	}

	third := serve(t, address.Reserve(t), "third")
	eye.follow(third.Listener.Addr().String())
	load.follow(third.Listener.Addr().String())
	other("second", "third")
	load.stop()
	if sent, failed, failure := load.result(); failed == 0 || sent <= failed || failure == "" {
		t.Errorf("%d of %d requests failed, the first with %q", failed, sent, failure)
	}
}

// TestRequestsEndWithAnAnswer stops the client while the server takes its time.
func TestRequestsEndWithAnAnswer(t *testing.T) {
	arrived, answer := make(chan struct{}, 1), make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		select {
		case arrived <- struct{}{}:
		default:
		}
		<-answer
		_, _ = io.WriteString(w, `{}`)
	}))
	defer s.Close()
	load := startRequests(t.Context(), s.Listener.Addr().String(), 100)
	<-arrived
	load.cancel()
	close(answer)
	load.stop()
	if sent, _, failure := load.result(); sent == 0 || strings.Contains(failure, "canceled") {
		t.Errorf("of %d requests one was cut off: %s", sent, failure)
	}
}

func TestExit(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	e, err := startExit(t.Context(), cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer e.stop()
	before := time.Now()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	at, err := e.wait(t.Context())
	if err != nil || at.Before(before) {
		t.Errorf("ended at %s, %v; it was alive at %s", at, err, before)
	}
	var exited *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exited) {
		t.Errorf("wait: %v", err)
	}
}

func exampleReport() *GapReport {
	gaps := func(ms ...float64) (all []Sample) {
		for i, g := range ms {
			all = append(all, Sample{Round: i, Gap: g, ProcessGap: g - 1, Sent: 100, Failed: int(g / 5)})
		}
		return all
	}
	gate := gaps(8, 9, 10)
	for i := range gate {
		gate[i].Method, gate[i].NodeGap = "gate", &gate[i].ProcessGap
	}
	overlap := gaps(0.4, 0.5, 0.6)
	overlap[2].Method = "plain"
	overlap[0].Method, overlap[1].Method = "overlap", "overlap"
	return &GapReport{
		Ways: []*WayResult{
			{Name: "kubelet", Title: "kubelet & image",
				Samples: append(gaps(90, 100, 110), Sample{Error: "no answer"})},
			{Name: "gate", Title: "gate", Expected: "gate", Samples: gate},
			{Name: "overlap", Title: "overlap", Expected: "overlap", Samples: overlap},
			{Name: "recreate", Title: "none of it worked", Samples: []Sample{{Error: "no answer"}}},
		},
		Series: []SeriesResult{{Name: "gate", Title: "gate", Samples: [][]float64{{8, 8, 8, 8, 16}, {8, 8, 8, 8, 16}}}},
	}
}

func TestGapReport(t *testing.T) {
	r := exampleReport()
	r.finish()
	if w := r.way("kubelet"); w.N != 3 || w.Gap != (Stats{Median: 100, P90: 100, Min: 90, Max: 110}) || w.Sent != 300 ||
		w.OfKubelet != 1 {
		t.Errorf("kubelet: %+v", w)
	}
	if w := r.way("gate"); w.OfKubelet != 0.09 || w.NodeGap == nil || w.NodeGap.Median != 8 {
		t.Errorf("gate: %+v", w)
	}
	if len(r.Notes) != 1 || !strings.Contains(r.Notes[0], `overlap: the node says that it used method "plain"`) {
		t.Errorf("notes: %q", r.Notes)
	}
	var met []bool
	for _, g := range r.Goals {
		met = append(met, g.Met)
	}
	// 9 ms, 9 % of kubelet's, nothing failed, but the fifth restart takes twice as long as the
	// first.
	if !slices.Equal(met, []bool{true, true, true, false}) {
		t.Errorf("goals: %+v", r.Goals)
	}
	var table strings.Builder
	r.print(&table)
	for _, want := range []string{"| gate | 9.0 ms | 9.0 ms | 8.0 ms – 10.0 ms | 0.09 × |", "MISSED  2 (goal ≤ 1.25)"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("no %q in\n%s", want, &table)
		}
	}
	if strings.Contains(table.String(), "| none of it worked |") {
		t.Errorf("a way without samples is in the table:\n%s", &table)
	}
}

func TestPlotIsXML(t *testing.T) {
	full := exampleReport()
	full.finish()
	for name, tt := range map[string]struct {
		report *GapReport
		dots   int
	}{
		"empty":          {&GapReport{}, 0},
		"without series": {&GapReport{Ways: full.Ways}, 9},
		"full":           {full, 19},
		"no gap at all": {&GapReport{Ways: []*WayResult{{Title: "x", N: 1, Samples: []Sample{{Gap: 0}, {Gap: -1}}}}},
			2},
	} {
		t.Run(name, func(t *testing.T) {
			dots := 0
			for d := xml.NewDecoder(strings.NewReader(tt.report.svg())); ; {
				token, err := d.Token()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if e, ok := token.(xml.StartElement); ok && e.Name.Local == "circle" {
					dots++
				}
			}
			if dots != tt.dots {
				t.Errorf("%d dots, want %d", dots, tt.dots)
			}
		})
	}
}
