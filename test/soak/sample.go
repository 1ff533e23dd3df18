// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sample is the state of the node at one moment. Memory is in MiB, files are in bytes.
type sample struct {
	Seconds  float64 `json:"seconds"`  // since the first restart
	Restarts int     `json:"restarts"` // finished
	// The proxy's process.
	RSS        float64 `json:"rssMiB"`
	Anonymous  float64 `json:"rssAnonMiB"` // without pages of files
	Heap       float64 `json:"heapMiB"`    // live and not yet collected
	Live       float64 `json:"liveMiB"`    // as of the last collection, which allows as much again
	Kept       int     `json:"operations"` // in the journal
	FDs        float64 `json:"fds"`
	Goroutines float64 `json:"goroutines"`
	Threads    int     `json:"threads"`
	// Its state directory.
	Journal  int64   `json:"journalBytes"`
	Records  int64   `json:"recordsBytes"`
	Gates    int     `json:"gates"`
	Recorded float64 `json:"recordedContainers"`
	Active   float64 `json:"activeOperations"`
	// What containerd has, and what kubelet has collected so far.
	Running int     `json:"running"`
	Exited  int     `json:"exited"`
	Created int     `json:"created"`
	Removed float64 `json:"removedByKubelet"`
	Shims   int     `json:"shims"`
	Mounts  int     `json:"mounts"`
	// The others' memory, for comparison.
	KubeletRSS    float64 `json:"kubeletRSSMiB"`
	ContainerdRSS float64 `json:"containerdRSSMiB"`

	metrics map[string]float64
}

// sampler collects samples.
type sampler struct {
	*soak
	mu      sync.Mutex // guards all following fields
	samples []sample
	errs    []error
}

// run takes samples and prints lines until ctx ends.
func (s *sampler) run(ctx context.Context) {
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	defer s.out.clear()
	said := time.Now()
	for {
		one, err := s.take(ctx)
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		if err != nil {
			s.errs = append(s.errs, err)
		} else {
			s.samples = append(s.samples, one)
		}
		s.mu.Unlock()
		sent, finished, failures := s.restarts.progress()
		switch {
		case err != nil:
			s.tell("not measured: %v", err)
		case time.Since(said) >= sayEvery:
			said = time.Now()
			s.tell("%5d restarts (%.1f/s), %d failed  RSS %.1f MiB  fds %.0f  goroutines %.0f  journal %d KiB  "+
				"records %d KiB  gates %d  containers %d+%d",
				finished, float64(finished)/time.Since(s.began).Seconds(), failures, one.RSS, one.FDs, one.Goroutines,
				one.Journal>>10, one.Records>>10, one.Gates, one.Running, one.Exited)
		}
		done, text := 0.0, fmt.Sprintf("%d restarts", finished)
		if s.o.restarts > 0 {
			done, text = float64(finished)/float64(s.o.restarts),
				fmt.Sprintf("%d of %d restarts", finished, s.o.restarts)
		}
		if s.o.time > 0 {
			done = max(done, float64(time.Since(s.began))/float64(s.o.time))
		}
		s.out.progress(done, fmt.Sprintf("%s, %d under way, %d failed, %s", text, sent-finished, failures,
			time.Since(s.began).Round(time.Second)))
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// all returns the samples and the errors of those that could not be taken.
func (s *sampler) all() ([]sample, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]sample(nil), s.samples...), errors.Join(s.errs...)
}

// take measures once.
func (s *sampler) take(ctx context.Context) (sample, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	metrics, err := scrape(ctx, "http://"+s.bed.MetricsAddress+"/metrics")
	if err != nil {
		return sample{}, err
	}
	one := sample{
		RSS:  metrics["process_resident_memory_bytes"] / (1 << 20),
		Heap: metrics["go_memstats_heap_alloc_bytes"] / (1 << 20),
		Live: metrics["go_memstats_next_gc_bytes"] / 2 / (1 << 20),
		Kept: int(min(sum(metrics, "criproxy_operations_total"), journalOperations)),
		FDs:  metrics["process_open_fds"], Goroutines: metrics["go_goroutines"],
		Recorded: metrics["criproxy_recorded_containers"], Active: sum(metrics, "criproxy_operations_active"),
		Removed: calls(metrics, "RemoveContainer"), metrics: metrics,
		Anonymous:     statusMiB(s.bed.Pid("cri-proxy"), "RssAnon:"),
		KubeletRSS:    statusMiB(s.bed.Pid("kubelet"), "VmRSS:"),
		ContainerdRSS: statusMiB(s.bed.Pid("containerd"), "VmRSS:"),
	}
	if s.restarts != nil {
		one.Seconds = time.Since(s.began).Seconds()
		_, one.Restarts, _ = s.restarts.progress()
	}
	if tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", s.bed.Pid("cri-proxy"))); err == nil {
		one.Threads = len(tasks)
	}
	one.Journal = fileSize(filepath.Join(s.bed.StateDir, "journal.db"))
	one.Records = fileSize(filepath.Join(s.bed.StateDir, "records.db"))
	gates, err := os.ReadDir(filepath.Join(s.bed.StateDir, "gates"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return sample{}, err
	}
	one.Gates = len(gates)
	list, err := s.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return sample{}, fmt.Errorf("listing containers: %w", err)
	}
	for _, c := range list.GetContainers() {
		switch c.GetState() {
		case runtimeapi.ContainerState_CONTAINER_RUNNING:
			one.Running++
		case runtimeapi.ContainerState_CONTAINER_EXITED:
			one.Exited++
		default:
			one.Created++
		}
	}
	one.Shims, err = s.shims()
	if err != nil {
		return sample{}, err
	}
	one.Mounts, err = s.mounts()
	return one, err
}

func fileSize(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return fi.Size()
}

// shims counts the processes that containerd keeps for the bed's pods.
func (s *sampler) shims() (int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	n := 0
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		// It may have ended.
		if b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline")); err == nil &&
			bytes.Contains(b, []byte("containerd-shim")) && bytes.Contains(b, []byte(s.bed.RunDir)) {
			n++
		}
	}
	return n, nil
}

// mounts counts the bed's mounts.
func (s *sampler) mounts() (int, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return 0, err
	}
	n := 0
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && (strings.HasPrefix(f[4], s.bed.Dir) ||
			strings.HasPrefix(f[4], s.bed.RunDir)) {
			n++
		}
	}
	return n, nil
}

// statusMiB reads a value in kB from a process' status.
func statusMiB(pid int, name string) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == name {
			kb, _ := strconv.ParseFloat(f[1], 64)
			return kb / 1024
		}
	}
	return 0
}

// scrape returns all series of a metrics endpoint by name and labels as they are printed.
func scrape(ctx context.Context, url string) (map[string]float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	// A connection of its own each time: one that is kept would be a file of the proxy's that comes
	// and goes.
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	return parseMetrics(resp.Body)
}

// parseMetrics reads the text format without timestamps.
func parseMetrics(r io.Reader) (map[string]float64, error) {
	out := map[string]float64{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		if i < 0 {
			return nil, fmt.Errorf("metrics: line %q has no value", line)
		}
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("metrics: line %q: %w", line, err)
		}
		out[line[:i]] = v
	}
	return out, lines.Err()
}

// calls sums kubelet's calls of one CRI method over all codes.
func calls(metrics map[string]float64, method string) float64 {
	n := 0.0
	for series, v := range metrics {
		if isCall(series, method) {
			n += v
		}
	}
	return n
}

func isCall(series, method string) bool {
	return strings.HasPrefix(series, "criproxy_calls_total{") && strings.Contains(series, "/"+method+`"`)
}

// sum adds up all series of a metric.
func sum(metrics map[string]float64, name string) float64 {
	n := 0.0
	for series, v := range metrics {
		if series == name || strings.HasPrefix(series, name+"{") {
			n += v
		}
	}
	return n
}
