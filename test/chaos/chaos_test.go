// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/chaos/faultproxy"
	"github.com/cri-proxy/cri-proxy/test/chaos/invariant"
)

const (
	// batch is how many pods are made at a time: together they start faster than one by one, and
	// all before the next fault.
	batch = 8
	// endTimeout bounds a restart after its fault: the runtime is waited for with pauses of up to
	// five seconds.
	endTimeout = time.Minute
	// settleTimeout bounds the time after the restart until kubelet and the API server have
	// followed, a back-off of kubelet's of 10 s included.
	settleTimeout = 30 * time.Second
	// glance bounds the last look. What kubelet does that it should not is counted for good; but
	// the lists that are compared are not of one moment, and kubelet may just be removing a
	// container that it has no more use for.
	glance = 5 * time.Second
)

func TestMatrixIsWellFormed(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range matrix() {
		if seen[c.name()] {
			t.Errorf("%s is there twice", c.name())
		}
		seen[c.name()] = true
	}
	for _, name := range slices.Concat(reduced, upReduced) {
		if !seen[name] {
			t.Errorf("%s is no case", name)
		}
	}
	t.Logf("%d cases, %d in the reduced set", len(seen), len(reduced))
}

func TestMatches(t *testing.T) {
	const name = "TestMatrix/StopFirst/gate/stop/kill-proxy"
	for pattern, want := range map[string]bool{
		"TestMatrix": true, "^TestMatrix$": true, "TestMatrix/StopFirst/gate/stop$/kill-proxy$": true,
		"TestMatrix/StopFirst/(gate|pidfd)/": true,
		"TestMatrix/StartFirst":              false, "TestMatrix/StopFirst/gate/stop$/kill-proxy-twice": false,
		"TestMatrix/StopFirst/(plain|pidfd)": false,
	} {
		if got := matches(pattern, name); got != want {
			t.Errorf("%s: %t, want %t", pattern, got, want)
		}
	}
	if got := splitOutside("a/(b|c)|d", '|'); !slices.Equal(got, []string{"a/(b|c)", "d"}) {
		t.Errorf("%q", got)
	}
}

// TestMatrix is the crash matrix. CHAOS=full runs all of it; a case runs alone with
//
//	CHAOS=full go test -race ./test/chaos -run TestMatrix/StopFirst/gate/stop/kill-proxy$
func TestMatrix(t *testing.T) {
	full := os.Getenv("CHAOS") == "full"
	cases := slices.DeleteFunc(matrix(), func(c chaosCase) bool {
		return (!full && !c.reduced) || !selected(t.Name()+"/"+c.name())
	})
	if len(cases) == 0 {
		t.Skip("no case selected; is CHAOS=full missing?")
	}
	c := start(t, slices.ContainsFunc(cases, func(c chaosCase) bool { return c.byRequest || c.upgrade }))
	must(t, c.create(t.Context(), c.podNamed(witness)))
	began, failed := time.Now(), 0
	for i, some := 0, []*corev1.Pod(nil); i < len(cases); i++ {
		if i%batch == 0 {
			some = nil
			for n := i; n < min(i+batch, len(cases)); n++ {
				some = append(some, c.podFor(cases[n], fmt.Sprintf("pod-%d", n)))
			}
			must(t, c.create(t.Context(), some...))
		}
		if !t.Run(cases[i].name(), func(t *testing.T) { c.run(t, cases[i], some[i%batch].Name) }) {
			failed++
		}
	}
	fmt.Fprintf(os.Stderr, "crash matrix: %d of %d cases run, %d failed, %s\n", len(cases), len(matrix()), failed,
		time.Since(began).Round(time.Second))
}

// selected says whether go test -run lets the test through, so that no pods are made for cases that
// do not run.
func selected(name string) bool {
	f := flag.Lookup("test.run")
	if f == nil || f.Value.String() == "" {
		return true
	}
	return slices.ContainsFunc(splitOutside(f.Value.String(), '|'),
		func(pattern string) bool { return matches(pattern, name) })
}

// matches is go test's rule: each part of the pattern matches the part of the name at its place.
func matches(pattern, name string) bool {
	parts := strings.Split(name, "/")
	for i, p := range splitOutside(pattern, '/') {
		if i < len(parts) && !regexp.MustCompile(p).MatchString(parts[i]) {
			return false
		}
	}
	return true
}

// splitOutside splits at separators that are in no brackets, as go test does.
func splitOutside(s string, at rune) []string {
	var out []string
	depth, from := 0, 0
	for i, r := range s {
		switch {
		case r == '(' || r == '[':
			depth++
		case r == ')' || r == ']':
			depth--
		case r == at && depth == 0:
			out, from = append(out, s[from:i]), i+1
		}
	}
	return append(out, s[from:])
}

// run is one case.
type run struct {
	*cluster
	chaosCase
	pod     string
	dir     string // where the failpoint says that it is reached
	before  *invariant.Facts
	request *opsv1.RestartRequest
	rollout *inplace.InPlaceRollout // of an upgrade
}

// run meets one restart with one fault and judges what is left.
func (c *cluster) run(t *testing.T, cs chaosCase, pod string) {
	ctx := t.Context()
	dir, err := os.MkdirTemp(c.scratch, "failpoint-")
	must(t, err)
	r := &run{cluster: c, chaosCase: cs, pod: pod, dir: dir}
	logged := size(c.bed.LogFile("cri-proxy"))
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		if err := errors.Join(r.goOn(), c.heal(ctx), r.removeRollout(ctx), c.remove(ctx, pod)); err != nil {
			t.Errorf("after the case: %v", err)
		}
		if t.Failed() {
			t.Logf("cri-proxy's log:\n%s", since(c.bed.LogFile("cri-proxy"), logged))
		}
	})
	must(t, c.configure(cs.method, cs.faulty()))
	must(t, c.restartProxy(ctx, syscall.SIGTERM, r.failpointName()))
	r.before, err = c.observe(ctx, pod)
	must(t, err)
	if len(r.before.Runtime) != 1 || r.before.Starts != 1 || r.before.Overlaps != 0 ||
		!slices.Equal(r.before.Created, []uint32{0}) {
		t.Fatalf("the pod is not as it should be before a restart: %+v", r.before)
	}
	if cs.faulty() {
		c.faults.Watch(r.before.PodUID, slotName)
	}
	if cs.point == "undo" && !cs.upgrade {
		c.faults.Arm(r.undoing())
	}
	if cs.upgrade {
		r.runUpgrade(t)
		return
	}
	seen := c.watch(r.before.PodUID)
	defer seen.stop()
	r.request = &opsv1.RestartRequest{
		Uid: pod, Pod: &opsv1.PodRef{Namespace: namespace, Name: pod, Uid: r.before.PodUID}, Requester: "chaos",
		Containers: []*opsv1.ContainerRestart{{Name: slotName, Order: opsv1.Order_ORDER_STOP_FIRST}},
	}
	if cs.order == startFirst {
		r.request.Containers[0].Order, r.request.Containers[0].MinReadySeconds = opsv1.Order_ORDER_START_FIRST, 1
	}
	if cs.byRequest {
		must(t, r.createRequest(ctx))
	} else {
		defer r.command(ctx)()
	}

	op, err := r.strike(ctx)
	if err != nil {
		t.Fatalf("%v\noperation: %v", err, op)
	}
	var after *invariant.Facts
	var bad []string
	judge := func() error {
		if after, err = c.observe(ctx, pod); err != nil {
			return err
		}
		if after.Operation, after.Again, err = r.answers(ctx); err != nil {
			return err
		}
		if bad = invariant.Check(r.before, after, cs.want); len(bad) > 0 {
			return errors.New(strings.Join(bad, "\n"))
		}
		return r.requestAgrees(ctx, after.Operation)
	}
	err = eventually(ctx, settleTimeout, judge)
	if err == nil {
		// What kubelet makes of it counts too.
		if err = c.relisted(ctx, 2); err == nil {
			err = eventually(ctx, glance, judge)
		}
	}
	if err != nil {
		t.Errorf("%v\noperation: %v\nbefore: %s\nafter: %s", err, op, brief(r.before), brief(after))
	}
	// Whoever knows of the restart, something that runs is to be seen all the time, if it had to be
	// given up before the incumbent was stopped or after its successor was ready.
	whole := op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED || cs.want.Lost && (cs.method == gate || cs.method == overlap)
	if shown := seen.stop(); whole && len(shown) > 0 {
		t.Errorf("kubelet could see: %q", shown)
	}
	if cs.want.Lost {
		return
	}
	if one := op.GetContainers()[0]; op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED {
		t.Logf("succeeded: method %q (asked for %s), gap %s, warnings %q", one.GetMethod(), cs.method,
			one.GetGap().AsDuration(), one.GetWarnings())
	} else {
		t.Logf("failed: %s: %s", one.GetReason(), one.GetMessage())
	}
}

// faulty says whether the case needs the fault proxy between cri-proxy and the runtime. Others do
// without, so that cri-proxy meets the runtime itself.
func (c chaosCase) faulty() bool {
	return c.point == "undo" && !c.upgrade ||
		slices.Contains([]string{runtimeError, runtimeErrors, answerLost}, c.fault)
}

func (r *run) failpointName() string {
	name := "restart." + r.point
	switch {
	case slices.Contains(controllers, r.point):
		return ""
	case r.order == upBack:
		name = "upgrade." + r.point + "#2" // that of the way back
	case r.upgrade:
		name = "upgrade." + r.point
	}
	if r.fault == killProxy || r.fault == killTwice || r.want.Lost {
		return name
	}
	return name + "=pause:" + r.dir
}

// undoing is the fault that makes a restart fail in the first place.
func (r *run) undoing() faultproxy.Fault {
	f := r.refuse(1)
	f.Methods = []string{"StopContainer"}
	if r.order == startFirst {
		f.Methods, f.Times = []string{"StartContainer"}, 2 // the second one from a fresh container
	}
	return f
}

// refuse makes the next calls on the slot fail.
func (r *run) refuse(times int) faultproxy.Fault {
	return faultproxy.Fault{PodUID: r.before.PodUID, Container: slotName, Incumbent: r.before.Runtime[0].ID,
		Times: times, Code: codes.Unknown}
}

// command gives the command. It does not wait for the answer, for
// the proxy may be held at the failpoint before it answers. The returned function ends it.
func (r *run) command(ctx context.Context) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = r.onOps(func(ops opsv1.OpsClient) error {
			_, err := ops.Restart(ctx, r.request, grpc.WaitForReady(true)) // that it was taken is seen at the failpoint
			return err
		})
	})
	return func() { cancel(); wg.Wait() }
}

// goOn lets the restart leave the failpoint.
func (r *run) goOn() error { return os.WriteFile(filepath.Join(r.dir, "go"), nil, 0o600) }

// strike waits for the step, lets the fault happen and returns the operation when it has ended.
func (r *run) strike(ctx context.Context) (*opsv1.Operation, error) {
	switch r.fault {
	case loseJournal, ruinJournal:
		if err := r.died(ctx); err != nil {
			return nil, err
		}
		if err := errors.Join(r.lose(), r.restartProxy(ctx, syscall.SIGKILL, "")); err != nil || !r.upgrade {
			return nil, err
		}
		return r.ended(ctx)
	case killProxy:
		if err := r.died(ctx); err != nil {
			return nil, err
		}
		if err := r.restartProxy(ctx, syscall.SIGKILL, ""); err != nil {
			return nil, err
		}
		return r.ended(ctx)
	case killTwice:
		if err := r.died(ctx); err != nil {
			return nil, err
		}
		if err := r.dieAgain(ctx); err != nil {
			return nil, err
		}
		return r.ended(ctx)
	}
	if err := r.reached(ctx); err != nil {
		return nil, r.notReached(ctx, err)
	}
	if err := r.hit(ctx); err != nil {
		return nil, err
	}
	op, err := r.ended(ctx)
	if err != nil || (r.fault != diskFull && r.fault != diskFullKill) {
		return op, err
	}
	// What it has said must stay true when there is space again and another process reads the
	// journal.
	if err := errors.Join(r.disk.free(), r.restartProxy(ctx, syscall.SIGTERM, "")); err != nil {
		return op, err
	}
	again, err := r.ended(ctx)
	if err == nil && again.GetPhase() != op.GetPhase() {
		err = fmt.Errorf("the restart ended as %s (%s), and after a restart of the proxy as %s", op.GetPhase(),
			op.GetMessage(), again.GetPhase())
	}
	return again, err
}

// lose takes the journal away.
func (r *run) lose() error {
	journal := filepath.Join(r.disk.state(), "journal.db")
	if r.fault == loseJournal {
		return os.Remove(journal)
	}
	return os.WriteFile(journal, bytes.Repeat([]byte("no journal "), 2000), 0o600)
}

// reached waits until the step has come.
func (r *run) reached(ctx context.Context) error {
	switch r.point {
	case "asked":
		return nil
	case "complete":
		return eventually(ctx, endTimeout, func() error { return r.rolloutEnded(ctx) })
	}
	return eventually(ctx, endTimeout, func() error {
		_, err := os.Stat(filepath.Join(r.dir, "reached"))
		return err
	})
}

func (r *run) notReached(ctx context.Context, why error) error {
	op, _, err := r.operation(ctx)
	return fmt.Errorf("the proxy does not come to the failpoint: %w; operation: %v (%w)", why, op, err)
}

// died waits until the failpoint has killed the proxy.
func (r *run) died(ctx context.Context) error {
	select {
	case <-r.bed.Process("cri-proxy").Done():
		return nil
	case <-time.After(endTimeout):
		return r.notReached(ctx, errors.New("it is still alive"))
	}
}

// dieAgain starts the proxy so that it dies at the next step, if it comes by, and once more so that
// it does not.
func (r *run) dieAgain(ctx context.Context) error {
	points, kind := stopFirstPoints, "restart."
	switch {
	case r.upgrade:
		points, kind = upStopFirstPoints, "upgrade."
	case r.order == startFirst:
		points = startFirstPoints
	}
	next := points[slices.Index(points, r.point)+1]
	if err := os.WriteFile(r.failpoint, []byte(kind+next), 0o600); err != nil {
		return err
	}
	if err := r.bed.LaunchProxy(ctx); err != nil {
		return err
	}
	err := eventually(ctx, endTimeout, func() error {
		if !r.bed.Process("cri-proxy").Running() {
			return nil
		}
		if _, ended, err := r.operation(ctx); err != nil || !ended {
			return fmt.Errorf("the second process neither dies at %s nor ends the restart: %w", next, err)
		}
		return nil
	})
	return errors.Join(err, r.restartProxy(ctx, syscall.SIGKILL, ""))
}

// hit lets the fault happen to the restart, which waits, and lets it go on.
func (r *run) hit(ctx context.Context) error {
	containerd := r.bed.Process("containerd")
	switch r.fault {
	case killContainerd:
		err := errors.Join(r.bed.StopContainerd(ctx, syscall.SIGKILL), r.goOn())
		pass(ctx, 200*time.Millisecond) // it runs into the runtime's absence
		return errors.Join(err, r.bed.StartContainerd(ctx))
	case lateKill:
		err := r.goOn()
		pass(ctx, 30*time.Millisecond) // about half of a StartContainer or StopContainer
		return errors.Join(err, r.bed.StopContainerd(ctx, syscall.SIGKILL), r.bed.StartContainerd(ctx))
	case killController:
		err := errors.Join(r.bed.StopController(ctx, syscall.SIGKILL), r.goOn())
		pass(ctx, 300*time.Millisecond) // the node goes on without it
		return errors.Join(err, r.bed.StartController(ctx))
	case killAll:
		return errors.Join(r.bed.StopController(ctx, syscall.SIGKILL), r.bed.StopKubelet(ctx, syscall.SIGKILL),
			r.restartProxy(ctx, syscall.SIGKILL, ""),
			r.bed.StartKubelet(ctx), r.bed.StartController(ctx))
	case restartKubelet:
		return errors.Join(r.bed.StopKubelet(ctx, syscall.SIGKILL), r.bed.StartKubelet(ctx),
			r.relisted(ctx, 3), r.goOn())
	case runtimeHangs:
		err := errors.Join(containerd.Signal(syscall.SIGSTOP), r.goOn())
		pass(ctx, 3*time.Second)
		return errors.Join(err, containerd.Signal(syscall.SIGCONT))
	case runtimeError:
		r.faults.Arm(r.refuse(1))
		return r.goOn()
	case runtimeErrors:
		r.faults.Arm(r.refuse(3))
		return r.goOn()
	case answerLost:
		f := r.refuse(1)
		f.Lost = true
		r.faults.Arm(f)
		return r.goOn()
	case diskFull:
		return errors.Join(r.disk.fill(), r.goOn())
	case diskFullKill:
		if err := errors.Join(r.disk.fill(), r.goOn()); err != nil {
			return err
		}
		pass(ctx, time.Second) // it does what it can without its journal
		// Kubelet is served by a proxy that starts on a full disk.
		return errors.Join(r.restartProxy(ctx, syscall.SIGKILL, ""), r.relisted(ctx, 1), r.disk.free())
	}
	return fmt.Errorf("unknown fault %q", r.fault)
}

// pass lets time pass: here the time itself is the fault.
func pass(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// operation returns the restart, and whether it has ended.
func (r *run) operation(ctx context.Context) (op *opsv1.Operation, ended bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if r.upgrade {
		return nil, r.rolloutEnded(ctx) == nil, nil
	}
	err = r.onOps(func(ops opsv1.OpsClient) (err error) {
		op, err = ops.GetOperation(ctx, &opsv1.GetOperationRequest{Uid: r.request.GetUid()}, grpc.WaitForReady(true))
		return err
	})
	return op, op.GetFinishTime() != nil, err
}

func (r *run) ended(ctx context.Context) (*opsv1.Operation, error) {
	var op *opsv1.Operation
	err := eventually(ctx, endTimeout, func() (err error) {
		ended := false
		if op, ended, err = r.operation(ctx); err == nil && !ended {
			err = errors.New("it has not ended")
			if r.upgrade {
				err = r.rolloutEnded(ctx)
			}
		}
		return err
	})
	return op, err
}

// answers returns the operation, and what the same command is answered.
func (r *run) answers(ctx context.Context) (op, again *opsv1.Operation, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err = r.onOps(func(ops opsv1.OpsClient) (err error) {
		get := &opsv1.GetOperationRequest{Uid: r.request.GetUid()}
		op, err = ops.GetOperation(ctx, get)
		if r.want.Lost && status.Code(err) == codes.NotFound {
			op = nil
			return nil
		}
		if err != nil || r.want.Lost {
			return err
		}
		if r.byRequest { // the controller's command is not known here
			again, err = ops.GetOperation(ctx, get)
		} else {
			again, err = ops.Restart(ctx, r.request)
		}
		return err
	})
	return op, again, err
}

// watching lists the slot through the proxy over and over.
type watching struct {
	stop func() (bad []string)
}

// watch begins to look at the slot as kubelet sees it. stop returns what a kubelet must never see
// during a restart: nothing that runs, more than one container that runs, or one that is only
// created.
func (c *cluster) watch(podUID string) *watching {
	ctx, cancel := context.WithCancel(context.Background())
	bad, done := []string(nil), make(chan struct{})
	go func() {
		defer close(done)
		conn, err := grpc.NewClient("unix://"+c.bed.ProxySocket,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithConnectParams(
				grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1,
					MaxDelay: 20 * time.Millisecond}}))
		if err != nil {
			bad = append(bad, err.Error())
			return
		}
		defer conn.Close()
		for ; ctx.Err() == nil && len(bad) < 5; pass(ctx, 10*time.Millisecond) {
			list, err := listSlot(ctx, conn, podUID)
			if err != nil {
				continue // the proxy or the runtime is away, which kubelet sees too
			}
			running, created := 0, 0
			for _, x := range list {
				switch x.State {
				case runtimeapi.ContainerState_CONTAINER_RUNNING:
					running++
				case runtimeapi.ContainerState_CONTAINER_CREATED:
					created++
				}
			}
			if running != 1 || created != 0 {
				bad = append(bad, fmt.Sprint(list))
			}
		}
	}()
	return &watching{stop: sync.OnceValue(func() []string { cancel(); <-done; return bad })}
}

// brief is for people: what Check has to say about the rest names it.
func brief(f *invariant.Facts) string {
	if f == nil {
		return "unknown"
	}
	return fmt.Sprintf("%s, runtime %v, proxy %v, status %+v, gates %v, logs %v, started %d times, kubelet created %v",
		f.Phase, f.Runtime, f.Proxy, f.API, f.Gates, f.Logs, f.Starts, f.Created)
}

func size(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

// since returns a file's content from an offset on; of a long one the end.
func since(path string, at int64) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	const most = 16 << 10
	if _, err := f.Seek(max(at, size(path)-most), io.SeekStart); err != nil {
		return err.Error()
	}
	b, _ := io.ReadAll(f)
	return string(b)
}
