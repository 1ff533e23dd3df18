// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// How much the last quarter of a run may be above the second one: a share, for what varies with the
// load, and an amount.
const (
	// A collection more or less.
	memoryShare, memoryMiB = 0.05, 2.0
	// operationMiB is what a finished operation, which is answered for an hour, takes of RSS: 2.5
	// KiB of live memory, as much again that the collector allows, and 2 KiB of the journal's file,
	// which is mapped. That ends at journalOperations.
	operationMiB = 7.0 / 1024
	// A file or two more or less are connections that come and go.
	fileShare, files = 0, 4.0
	// So are ten goroutines for each of them, and some for each operation under way.
	goroutineShare, goroutines = 0.10, 20.0
	// fewSamples is what a comparison of quarters needs.
	fewSamples = 12
)

// journalPerOperation and journalBase bound the journal's file: an operation of one container takes
// about one KiB, its pages are half full, and bbolt keeps as much again free and doubles its file.
// The journal keeps at most 2,000 finished operations.
const (
	journalPerOperation = 8 << 10
	journalBase         = 256 << 10
	journalOperations   = 2000
)

// check is one promise and what became of it.
type check struct {
	Name   string   `json:"name"`
	OK     bool     `json:"ok"`
	Detail string   `json:"detail"`
	Faults []string `json:"faults,omitempty"`
}

// judgement collects checks.
type judgement struct{ checks []check }

// check adds a check that holds when there are no faults.
func (j *judgement) check(name string, faults []string, format string, args ...any) {
	j.checks = append(j.checks, check{Name: name, OK: len(faults) == 0, Detail: fmt.Sprintf(format, args...),
		Faults: faults})
}

// judge waits until the cluster has come to rest, and looks at what happened.
func (s *soak) judge(ctx context.Context) *result {
	s.tell("the last restart is over; waiting for kubelet's word on all of them")
	rest, faults := s.settle(ctx)
	j := &judgement{}
	slots := s.slots()

	n, failed := 0, []string(nil)
	for _, sl := range slots {
		for _, r := range sl.commanded() {
			n++
			if r.err != nil {
				failed = append(failed, fmt.Sprintf("%s, operation %s (%s): %v", sl, r.uid, r.via, r.err))
			}
		}
	}
	if want := s.o.restarts; want > 0 && n != want {
		failed = append(failed, fmt.Sprintf("%d restarts were commanded, not %d", n, want))
	}
	j.check("none lost: every operation succeeded", failed, "%d restarts of %d containers in %d pods", n,
		len(slots), len(s.pods))
	j.check("none lost: each successor is the next incumbent", each(slots, chain),
		"from kubelet's container to the one that runs now")
	lives, broken := s.ledger.bySlot()
	made := each(slots,
		func(sl *slot) error { return attempts(lives[sl.pod.uid+"/"+sl.container], len(sl.commanded())) })
	if broken != nil {
		made = append(made, broken.Error())
	}
	j.check("none doubled: attempts without holes or doubles", made,
		"from containerd's events: each created, started and stopped once")
	var t traffic
	processes, answers, lost := 0, []string(nil), []string(nil)
	for _, sl := range slots {
		one, seen, violations, overlapped := sl.client.state()
		t.add(one)
		for _, o := range overlapped {
			lost = append(lost, fmt.Sprintf("%s: %s", sl, o))
		}
		processes += seen
		answers = append(answers, violations...)
		if most := len(sl.commanded()) + 1; seen > most {
			answers = append(answers, fmt.Sprintf("%s: %d processes have answered after %d restarts", sl, seen, most-1))
		}
	}
	j.check("one process at a time, and it answers", answers,
		"%d answers of %d processes; %d requests failed during restarts StopFirst, %d at other times",
		t.Answered, processes, t.UnansweredStopFirst, t.UnansweredCalm)
	j.check("StartFirst fails no request", lost, "%d requests failed", t.UnansweredStartFirst)
	j.check("kubelet's pod status agrees with containerd's", faults,
		"IDs, restart counts, states, last states, start times, %.0f s after the last restart", rest.Seconds())
	s.judgeKubelet(j)
	s.judgeProxy(ctx, j)

	samples, missed := s.sampler.all()
	j.flat("memory is flat", samples, func(x sample) float64 { return x.RSS - operationMiB*float64(x.Kept) },
		memoryShare, memoryMiB,
		fmt.Sprintf("RSS %%.1f → %%.1f MiB without %.0f KiB for each operation that is answered for an hour",
			1024*operationMiB))
	j.flat("files are flat", samples, func(x sample) float64 { return x.FDs }, fileShare, files,
		"%.0f → %.0f descriptors")
	j.flat("goroutines are flat", samples, func(x sample) float64 { return x.Goroutines }, goroutineShare,
		goroutines, "%.0f → %.0f")
	if missed != nil {
		j.check("the proxy could be measured all the time", []string{missed.Error()}, "")
	}
	return s.result(j.checks, t, processes, samples)
}

// each returns what f finds wrong with the slots.
func each(slots []*slot, f func(*slot) error) []string {
	var out []string
	for _, s := range slots {
		if err := f(s); err != nil {
			out = append(out, fmt.Sprintf("%s: %s", s, strings.ReplaceAll(err.Error(), "\n", "; ")))
		}
	}
	return out
}

// chain checks that each restart's successor is the next one's incumbent.
func chain(s *slot) error {
	var done []*opsv1.ContainerOperation
	for _, r := range s.commanded() {
		if r.op != nil {
			done = append(done, r.op)
		}
	}
	slices.SortFunc(done, func(a, b *opsv1.ContainerOperation) int { return int(a.GetAttempt()) - int(b.GetAttempt()) })
	at, attempt := s.first, uint32(0)
	for _, op := range done {
		if op.GetIncumbentId() != at || op.GetAttempt() != attempt+1 {
			return fmt.Errorf("attempt %d replaced %.12s, but attempt %d was %.12s", op.GetAttempt(),
				op.GetIncumbentId(), attempt, at)
		}
		at, attempt = op.GetSuccessorId(), op.GetAttempt()
	}
	return nil
}

// settle waits until kubelet's pod status and containerd's containers say the same and kubelet has
// collected what it does not keep. It returns how long that took and what is still different.
func (s *soak) settle(ctx context.Context) (time.Duration, []string) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		faults, err := s.compare(ctx)
		if err == nil && len(faults) == 0 {
			return time.Since(began), nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if err != nil && len(faults) == 0 {
				faults = []string{err.Error()}
			}
			return time.Since(began), faults
		}
	}
}

// compare lists the differences between the pods' status in the API and the containers in
// containerd.
func (s *soak) compare(ctx context.Context) ([]string, error) {
	list, err := s.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	containers := map[string][]*runtimeapi.Container{}
	for _, c := range list.GetContainers() {
		slot := c.GetLabels()[labelPodUID] + "/" + c.GetLabels()[labelContainer]
		containers[slot] = append(containers[slot], c)
	}
	pods := &corev1.PodList{}
	if err := s.api.List(ctx, pods, kube.InNamespace(namespace)); err != nil {
		return nil, err
	}
	status := map[string]corev1.ContainerStatus{}
	var faults []string
	for _, p := range pods.Items {
		if p.Status.Phase != corev1.PodRunning {
			faults = append(faults, fmt.Sprintf("%s: the pod is %s", p.Name, p.Status.Phase))
		}
		for _, c := range p.Status.ContainerStatuses {
			status[string(p.UID)+"/"+c.Name] = c
		}
	}
	for _, sl := range s.slots() {
		key := sl.pod.uid + "/" + sl.container
		kubelet, known := status[key]
		if !known {
			faults = append(faults, fmt.Sprintf("%s: the pod status does not have it", sl))
			continue
		}
		if n := len(sl.commanded()); int(kubelet.RestartCount) != n {
			faults = append(faults, fmt.Sprintf("%s: %d restarts were commanded, kubelet counts %d", sl, n,
				kubelet.RestartCount))
		}
		for _, fault := range s.compareSlot(ctx, kubelet, containers[key]) {
			faults = append(faults, fmt.Sprintf("%s: %s", sl, fault))
		}
	}
	return faults, nil
}

// compareSlot lists the differences between kubelet's status of a container and what containerd has
// of its attempts.
func (s *soak) compareSlot(
	ctx context.Context, kubelet corev1.ContainerStatus, have []*runtimeapi.Container,
) (faults []string) {
	differ := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	slices.SortFunc(have, func(a, b *runtimeapi.Container) int {
		return int(b.GetMetadata().GetAttempt()) - int(a.GetMetadata().GetAttempt())
	})
	if len(have) == 0 {
		return []string{"containerd has no container"}
	}
	for i, c := range have {
		want := runtimeapi.ContainerState_CONTAINER_EXITED
		if i == 0 {
			want = runtimeapi.ContainerState_CONTAINER_RUNNING
		}
		if c.GetState() != want {
			differ("attempt %d is %s in containerd", c.GetMetadata().GetAttempt(), c.GetState())
		}
	}
	// kubelet keeps the last one that has exited (maxPerPodContainerCount is 1).
	if len(have) > 2 {
		differ("%d exited containers are left", len(have)-1)
	}
	newest := have[0]
	if bareID(kubelet.ContainerID) != newest.GetId() {
		differ("kubelet has %.12s, containerd %.12s", bareID(kubelet.ContainerID), newest.GetId())
	}
	if uint32(kubelet.RestartCount) != newest.GetMetadata().GetAttempt() {
		differ("kubelet counts %d restarts, attempt %d runs", kubelet.RestartCount, newest.GetMetadata().GetAttempt())
	}
	if kubelet.State.Running == nil {
		differ("kubelet does not say that it runs: %+v", kubelet.State)
		return faults
	}
	// The start time is what kubelet is shown: the proxy corrects that of a gated start.
	st, err := s.cri.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: newest.GetId()})
	if err != nil {
		differ("its status: %v", err)
		return faults
	}
	if started := time.Unix(0, st.GetStatus().GetStartedAt()).
		Truncate(time.Second); !kubelet.State.Running.StartedAt.Time.Equal(started) {
		differ("kubelet says that it began at %s, the runtime %s", kubelet.State.Running.StartedAt.UTC(), started.UTC())
	}
	if len(have) < 2 || !kubelet.Ready {
		if !kubelet.Ready {
			differ("it is not ready")
		}
		return faults
	}
	last := kubelet.LastTerminationState.Terminated
	if last == nil {
		differ("kubelet does not know the exited container %.12s", have[1].GetId())
		return faults
	}
	st, err = s.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: have[1].GetId()})
	switch {
	case err != nil:
		differ("the exited container's status: %v", err)
	case bareID(last.ContainerID) != have[1].GetId() || last.ExitCode != st.GetStatus().GetExitCode():
		differ("kubelet's last state is %.12s with exit code %d, containerd's %.12s with %d", bareID(last.ContainerID),
			last.ExitCode, have[1].GetId(), st.GetStatus().GetExitCode())
	}
	return faults
}

// judgeKubelet checks that kubelet has taken no part in restarts.
func (s *soak) judgeKubelet(j *judgement) {
	samples, _ := s.sampler.all()
	if len(samples) == 0 {
		j.check("kubelet took no part", []string{"nothing was measured"}, "")
		return
	}
	last := samples[len(samples)-1]
	var faults []string
	for _, m := range []string{"StopContainer", "CreateContainer", "StartContainer", "StopPodSandbox",
		"RunPodSandbox"} {
		for _, series := range slices.Sorted(maps.Keys(last.metrics)) {
			if n := last.metrics[series] - s.before.metrics[series]; n != 0 && isCall(series, m) {
				faults = append(faults, fmt.Sprintf("%.0f calls: %s", n, series))
			}
		}
	}
	j.check("kubelet took no part", faults,
		"no Stop, Create or Start came from it; it collected %.0f exited containers", last.Removed-s.before.Removed)
}

// judgeProxy checks what the proxy has left when nothing is under way.
func (s *soak) judgeProxy(ctx context.Context, j *judgement) {
	end, err := s.sampler.take(ctx)
	if err != nil {
		j.check("nothing is left behind", []string{err.Error()}, "")
		return
	}
	var faults []string
	wrong := func(bad bool, format string, args ...any) {
		if bad {
			faults = append(faults, fmt.Sprintf(format, args...))
		}
	}
	wrong(end.Active != 0, "%.0f operations are unfinished", end.Active)
	wrong(end.Gates != 0, "%d gates are in the state directory", end.Gates)
	wrong(end.Created != 0, "%d containers are created and were never started", end.Created)
	wrong(int(end.Recorded) != end.Running+end.Exited, "%.0f containers are recorded, containerd has %d", end.Recorded,
		end.Running+end.Exited)
	wrong(end.Running != len(s.slots()), "%d containers run in %d slots", end.Running, len(s.slots()))
	wrong(end.Shims != s.before.Shims, "%d shims run, %d before", end.Shims, s.before.Shims)
	wrong(end.Mounts != s.before.Mounts, "%d mounts, %d before", end.Mounts, s.before.Mounts)
	j.check("nothing is left behind", faults,
		"no operation, gate or staged container; %d records, shims and mounts as before", int(end.Recorded))

	faults = nil
	wrong(sum(end.metrics, "criproxy_interceptor_faults_total") != 0, "%.0f interceptor faults",
		sum(end.metrics, "criproxy_interceptor_faults_total"))
	wrong(end.metrics["process_start_time_seconds"] != s.before.metrics["process_start_time_seconds"],
		"the proxy has been restarted")
	j.check("the proxy ran without a fault", faults, "one process, no call passed through for an error of its own")

	operations := sum(end.metrics, "criproxy_operations_total")
	limit := journalBase + journalPerOperation*min(int64(operations), journalOperations)
	faults = nil
	wrong(end.Journal > limit, "it has %d KiB, more than %d KiB", end.Journal>>10, limit>>10)
	wrong(end.Journal == 0, "journal.db is not in %s", s.bed.StateDir)
	j.check("the journal is bounded", faults,
		"journal.db %d KiB after %.0f operations (limit %d KiB), records.db %d KiB", end.Journal>>10, operations,
		limit>>10, end.Records>>10)
}

// flat compares the medians of the second and the last quarter.
func (j *judgement) flat(
	name string, samples []sample, value func(sample) float64, share, amount float64, format string,
) {
	if len(samples) < fewSamples {
		j.check(name, nil, "not judged: %d samples are too few", len(samples))
		return
	}
	second, last := quarters(samples, value)
	var faults []string
	if limit := second*(1+share) + amount; last > limit {
		faults = []string{fmt.Sprintf("more than %.1f", limit)}
	}
	detail := fmt.Sprintf(format, second, last)
	j.check(name, faults, "%s, medians of the second and the last quarter of %d samples (up to %+.0f %% and %+.0f is "+
		"flat)", detail, len(samples), 100*share, amount)
}

// quarters returns the medians of the second and the last quarter of a run; the first one warms up.
func quarters(samples []sample, value func(sample) float64) (second, last float64) {
	q := len(samples) / 4
	return median(samples[q:2*q], value), median(samples[len(samples)-q:], value)
}

func median(samples []sample, value func(sample) float64) float64 {
	v := make([]float64, len(samples))
	for i, s := range samples {
		v[i] = value(s)
	}
	return quantile(v, 0.5)
}

// quantile of values in any order; 0 of none.
func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[int(q*float64(len(v)-1)+0.5)]
}
