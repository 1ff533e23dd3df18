// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

type fanoutOptions struct {
	out        string
	controller string
	sizes      []int
	idle       time.Duration
}

// FanoutReport is the outcome of the command fanout.
type FanoutReport struct {
	Time       time.Time `json:"time"`
	Go         string    `json:"go"`
	CPUs       int       `json:"cpus"`
	LoadBefore string    `json:"load_before"`
	LoadAfter  string    `json:"load_after"`
	// Start is the controller with nothing to do.
	Start holding     `json:"start"`
	Cases []FanoutJob `json:"cases"`
}

// FanoutJob is an image job over so many nodes, all at once, twice.
type FanoutJob struct {
	Nodes int `json:"nodes"`
	// First has to connect to every node, with a handshake and a new certificate on either side;
	// Second finds the connections open.
	First  FanoutRound `json:"first"`
	Second FanoutRound `json:"second"`
	// Peak is the controller's resident memory at the most.
	Peak        float64 `json:"peak_rss_mib"`
	Connections int     `json:"connections"`
	// Idle is after the jobs, with the connections kept; Gone after the nodes were removed and
	// their processes ended.
	Idle    holding `json:"idle"`
	IdleCPU float64 `json:"idle_cpu_percent"` // of one CPU
	Gone    holding `json:"gone"`
	Objects Objects `json:"objects"`
}

// FanoutRound is one job. Times are in seconds.
type FanoutRound struct {
	// Commanded is from the job's creation to the last node's command, Completed to the job's
	// completion. Each node takes one second of that for its pull.
	Commanded float64 `json:"commanded_seconds"`
	PerSecond float64 `json:"commands_per_second"`
	Completed float64 `json:"completed_seconds"`
	// CPU is the controller's, APICPU that of API server and etcd.
	CPU       float64 `json:"cpu_seconds"`
	APICPU    float64 `json:"api_cpu_seconds"`
	APIWrites int     `json:"api_writes"`
}

// holding is what a process holds.
type holding struct {
	RSS        float64 `json:"rss_mib"`
	Goroutines int     `json:"goroutines"`
	Files      int     `json:"files"`
}

// fanoutBench is one run of the command fanout.
type fanoutBench struct {
	bed  *testbed.Bed
	api  kube.WithWatch
	dir  string
	port int
	rest *rest.Config
}

func fanout(ctx context.Context, o fanoutOptions) (err error) {
	r := FanoutReport{Time: time.Now().UTC(), Go: runtime.Version(), CPUs: runtime.NumCPU(), LoadBefore: load()}
	b := &fanoutBench{}
	b.bed, err = testbed.Start(ctx,
		testbed.Options{Mode: testbed.ModeCluster, Log: os.Stderr, ControllerBinary: o.controller,
			KeepLogs: func() bool { return err != nil && ctx.Err() == nil }})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.bed.Close(context.WithoutCancel(ctx))) }()
	if b.dir, err = os.MkdirTemp(b.bed.Dir, "fleet-"); err != nil {
		return err
	}
	if err := newIdentities(b.dir); err != nil {
		return err
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	b.port = l.Addr().(*net.TCPAddr).Port //nolint:forcetypeassert // of a TCP listener
	if err := l.Close(); err != nil {
		return err
	}
	if b.rest, err = clientcmd.BuildConfigFromFlags("", b.bed.Kubeconfig); err != nil {
		return err
	}
	b.rest.QPS, b.rest.Burst = -1, 0
	scheme, err := scheme.New()
	if err != nil {
		return err
	}
	if b.api, err = kube.NewWithWatch(b.rest, kube.Options{Scheme: scheme}); err != nil {
		return err
	}
	if err := b.bed.InstallCRDs(ctx); err != nil {
		return err
	}
	// It would declare the nodes of the fleet dead: they have no kubelet.
	if err := b.bed.Process("kube-controller-manager").Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	for _, n := range o.sizes {
		// A controller of its own for each size, whose memory is not that of the one before.
		job, start, err := b.job(ctx, n, o.idle)
		if err != nil {
			return fmt.Errorf("%d nodes: %w", n, err)
		}
		r.Start = start
		job.print(os.Stdout)
		r.Cases = append(r.Cases, *job)
	}
	r.LoadAfter = load()
	if o.out == "" {
		return nil
	}
	j, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(o.out, append(j, '\n'), 0o644) //nolint:gosec // for everybody to read
}

// job runs one job over n nodes, and then removes them.
func (b *fanoutBench) job(ctx context.Context, n int, idle time.Duration) (_ *FanoutJob, fresh holding, err error) {
	fleet, err := start(ctx, "fleet", strconv.Itoa(b.port), b.dir)
	if err != nil {
		return nil, fresh, err
	}
	defer fleet.stop()
	if err := b.bed.StartController(ctx, "--tls-cert-file", filepath.Join(b.dir, clientCert), "--tls-key-file",
		filepath.Join(b.dir, clientKey),
		"--tls-ca-file", filepath.Join(b.dir, caCert), "--log-level", "warn"); err != nil {
		return nil, fresh, err
	}
	defer func() { err = errors.Join(err, b.bed.StopController(context.WithoutCancel(ctx), syscall.SIGTERM)) }()
	same, last := 0, 0
	if fresh, err = b.settled(ctx, "the controller has started", func(u holding) bool {
		if same++; u.Goroutines != last {
			same, last = 0, u.Goroutines
		}
		return same >= 5
	}); err != nil {
		return nil, fresh, err
	}
	if err := b.addNodes(ctx, n); err != nil {
		return nil, fresh, err
	}
	job := &FanoutJob{Nodes: n}
	if job.First, err = b.round(ctx, fleet, n, "first"); err != nil {
		return nil, fresh, err
	}
	if job.Second, err = b.round(ctx, fleet, n, "second"); err != nil {
		return nil, fresh, err
	}
	var seen fleetSeen
	if err := fleet.ask("seen", &seen); err != nil {
		return nil, fresh, err
	}
	job.Connections = seen.Connections
	if job.Peak, err = peakRSS(b.bed.Pid("cri-controller")); err != nil {
		return nil, fresh, err
	}
	if err := b.idle(ctx, job, idle); err != nil {
		return nil, fresh, err
	}
	if job.Objects, err = b.objects(ctx, n); err != nil {
		return nil, fresh, err
	}
	if err := b.api.DeleteAllOf(ctx, &v1beta1.ImagePullJob{}, kube.InNamespace("default")); err != nil {
		return nil, fresh, err
	}
	if err := b.api.DeleteAllOf(ctx, &corev1.Node{}, kube.MatchingLabels{"fleet": "true"}); err != nil {
		return nil, fresh, err
	}
	fleet.stop()
	job.Gone, err = b.settled(ctx, "the nodes are forgotten", func(u holding) bool {
		return u.Goroutines <= fresh.Goroutines+20 && u.Files <= fresh.Files+20
	})
	return job, fresh, err
}

// round runs one job over all nodes.
func (b *fanoutBench) round(ctx context.Context, fleet *process, n int, name string) (r FanoutRound, err error) {
	var seen fleetSeen
	if err := fleet.ask("seen", &seen); err != nil { // counts anew
		return r, err
	}
	before, err := b.spent(ctx)
	if err != nil {
		return r, err
	}
	all := intstr.FromString("100%")
	o := &v1beta1.ImagePullJob{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("%s-on-%d", name, n)},
		Spec: v1beta1.ImagePullJobSpec{Image: "registry.invalid/app:" + name,
			ImagePullJobTemplate: v1beta1.ImagePullJobTemplate{
				Parallelism: &all,
				Selector: &v1beta1.ImagePullJobNodeSelector{
					LabelSelector: metav1.LabelSelector{MatchLabels: map[string]string{"fleet": "true"}}},
			}},
	}
	began := time.Now()
	if err := b.api.Create(ctx, o); err != nil {
		return r, err
	}
	for o.Status.CompletionTime == nil {
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return r, err
		}
		if err := b.api.Get(ctx, kube.ObjectKeyFromObject(o), o); err != nil {
			return r, err
		}
		if time.Since(began) > 10*time.Minute {
			return r, fmt.Errorf("the job has not ended: %+v", o.Status)
		}
	}
	r.Completed = time.Since(began).Seconds()
	if int(o.Status.Succeeded) != n {
		return r, fmt.Errorf("%d of %d nodes have the image: %+v", o.Status.Succeeded, n, o.Status)
	}
	if err := fleet.ask("seen", &seen); err != nil {
		return r, err
	}
	after, err := b.spent(ctx)
	if err != nil {
		return r, err
	}
	r.Commanded = seen.Last.Sub(began).Seconds()
	r.PerSecond = float64(n) / r.Commanded
	r.CPU, r.APICPU, r.APIWrites = after.cpu-before.cpu, after.apiCPU-before.apiCPU, after.writes-before.writes
	fmt.Fprintf(os.Stderr, "%d nodes, %s job: %+v\n", n, name, r)
	return r, nil
}

// spent is what has been used so far.
type spent struct {
	cpu, apiCPU float64
	writes      int
}

func (b *fanoutBench) spent(ctx context.Context) (s spent, err error) {
	if s.cpu, err = b.metric(ctx, "process_cpu_seconds_total"); err != nil {
		return s, err
	}
	if s.apiCPU, err = b.apiCPU(); err != nil {
		return s, err
	}
	s.writes, err = b.writes(ctx)
	return s, err
}

// idle is what the controller uses while it has nothing to do, with its connections open.
func (b *fanoutBench) idle(ctx context.Context, job *FanoutJob, d time.Duration) error {
	if err := pause(ctx, 10*time.Second); err != nil { // the last writes, and a collection
		return err
	}
	before, err := b.metric(ctx, "process_cpu_seconds_total")
	if err != nil {
		return err
	}
	if err := pause(ctx, d); err != nil {
		return err
	}
	after, err := b.metric(ctx, "process_cpu_seconds_total")
	if err != nil {
		return err
	}
	job.IdleCPU = (after - before) / d.Seconds() * 100
	job.Idle, err = b.holds(ctx)
	return err
}

// addNodes makes the Node objects.
func (b *fanoutBench) addNodes(ctx context.Context, n int) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range n {
		g.Go(func() error {
			node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
				Name: nodeName(i), Labels: map[string]string{"fleet": "true", corev1.LabelHostname: nodeName(i)},
				Annotations: map[string]string{nodes.AddressAnnotation: fmt.Sprintf("127.77.%d.%d:%d", i/250, i%250+1,
					b.port)},
			}}
			if err := b.api.Create(ctx, node); err != nil {
				return err
			}
			now := metav1.Now()
			node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue,
				LastHeartbeatTime: now, LastTransitionTime: now, Reason: "Fleet"}}
			return b.api.Status().Update(ctx, node)
		})
	}
	return g.Wait()
}

func nodeName(i int) string { return fmt.Sprintf("fleet-%d", i) }

// settled waits until the controller's holding has been so.
func (b *fanoutBench) settled(ctx context.Context, what string, so func(holding) bool) (holding, error) {
	for end := time.Now().Add(20 * time.Minute); ; {
		u, err := b.holds(ctx)
		if err == nil && so(u) {
			return u, nil
		}
		if time.Now().After(end) {
			return u, fmt.Errorf("not within 20 minutes: %s: %+v (%w)", what, u, err)
		}
		if err := pause(ctx, time.Second); err != nil {
			return u, err
		}
	}
}

func (b *fanoutBench) holds(ctx context.Context) (holding, error) {
	var u holding
	for name, into := range map[string]func(float64){
		"process_resident_memory_bytes": func(v float64) { u.RSS = v / (1 << 20) },
		"go_goroutines":                 func(v float64) { u.Goroutines = int(v) },
		"process_open_fds":              func(v float64) { u.Files = int(v) },
	} {
		v, err := b.metric(ctx, name)
		if err != nil {
			return u, err
		}
		into(v)
	}
	return u, nil
}

// writes is how often the controller has written to the API server.
func (b *fanoutBench) writes(ctx context.Context) (int, error) {
	n, err := b.metric(ctx, "rest_client_requests_total", `method="PATCH"`, `method="POST"`, `method="PUT"`,
		`method="DELETE"`, `method="GET"`)
	if err != nil {
		return 0, err
	}
	reads, err := b.metric(ctx, "rest_client_requests_total", `method="GET"`)
	return int(n - reads), err
}

// metric is the sum of one of the controller's metrics over all labels, or over those with one of
// the pairs.
func (b *fanoutBench) metric(ctx context.Context, name string, pairs ...string) (float64, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+b.bed.ControllerMetricsAddress+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	answer, err := (&http.Client{Timeout: 10 * time.Second}).Do(r)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	sum, found := 0.0, false
	for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
		line := lines.Text()
		rest, ok := strings.CutPrefix(line, name)
		chosen := len(pairs) == 0 ||
			slices.ContainsFunc(pairs, func(p string) bool { return strings.Contains(rest, p) })
		if ok && chosen && (rest[0] == ' ' || rest[0] == '{') {
			v, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
			if err != nil {
				return 0, err
			}
			sum, found = sum+v, true
		}
	}
	if !found {
		return 0, fmt.Errorf("the controller has no metric %s", name)
	}
	return sum, nil
}

// peakRSS is the most memory that a process has had, in MiB.
func peakRSS(pid int) (float64, error) { return memory(pid, "VmHWM:") }

// rss is the memory that a process has, in MiB.
func rss(pid int) (float64, error) { return memory(pid, "VmRSS:") }

func memory(pid int, field string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field); ok {
			var kib float64
			if _, err := fmt.Sscanf(rest, "%f kB", &kib); err != nil {
				return 0, err
			}
			return kib / 1024, nil
		}
	}
	return 0, fmt.Errorf("process %d has no %s", pid, field)
}

func (j *FanoutJob) print(w io.Writer) {
	for _, r := range []struct {
		name string
		FanoutRound
	}{{"connecting", j.First}, {"connected", j.Second}} {
		fmt.Fprintf(w, "%d nodes, %s: all commanded after %.2f s (%.0f/s), job %.2f s, controller %.2f s CPU, API "+
			"server and etcd %.2f s, %d API writes\n",
			j.Nodes, r.name, r.Commanded, r.PerSecond, r.Completed, r.CPU, r.APICPU, r.APIWrites)
	}
	o := j.Objects
	fmt.Fprintf(w, "  an object per node:    all commanded after %.2f s, job %.2f s, API server and etcd %.2f s CPU, "+
		"%d API writes, %d watches (%+.0f MiB)\n",
		o.Commanded, o.Completed, o.APICPU, o.APIWrites, o.Watches, o.APIRSS)
	fmt.Fprintf(w, "  %d connections: peak %.0f MiB; idle %.0f MiB, %.2f %% of a CPU, %d goroutines, %d files; gone "+
		"%.0f MiB, %d goroutines, %d files\n",
		j.Connections, j.Peak, j.Idle.RSS, j.IdleCPU, j.Idle.Goroutines, j.Idle.Files, j.Gone.RSS, j.Gone.Goroutines,
		j.Gone.Files)
}
