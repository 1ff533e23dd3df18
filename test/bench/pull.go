// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

type pullOptions struct {
	out      string
	criProxy string
	rounds   int
	layers   int
	mib      int
}

// pullGoal is the least share of the runtime's own throughput.
const pullGoal = 0.95

// PullReport is the outcome of the command pull. Times are in seconds.
type PullReport struct {
	Time       time.Time `json:"time"`
	Go         string    `json:"go"`
	CPUs       int       `json:"cpus"`
	LoadBefore string    `json:"load_before"`
	LoadAfter  string    `json:"load_after"`
	Layers     int       `json:"layers"`
	MiB        float64   `json:"mib"` // compressed
	// Ahead is by cri-proxy, Direct by CRI PullImage on containerd's socket; the same index is the
	// same round.
	Ahead  []float64 `json:"ahead_seconds"`
	Direct []float64 `json:"direct_seconds"`
	// Ratio is the median over the rounds of cri-proxy's throughput by the direct one's, with its
	// quartiles.
	Ratio     float64 `json:"throughput_ratio"`
	RatioLow  float64 `json:"throughput_ratio_q1"`
	RatioHigh float64 `json:"throughput_ratio_q3"`
	Met       bool    `json:"met"`
}

// pullBench is one run of the command pull.
type pullBench struct {
	bed   *testbed.Bed
	image *largeImage
	cri   runtimeapi.ImageServiceClient
	conn  *grpc.ClientConn // to the runtime
	pulls opsv1.ImagesClient
}

func pullBenchmark(ctx context.Context, o pullOptions) (err error) {
	r := PullReport{Time: time.Now().UTC(), Go: runtime.Version(), CPUs: runtime.NumCPU(), LoadBefore: load(),
		Layers: o.layers}
	b := &pullBench{}
	b.bed, err = testbed.Start(ctx, testbed.Options{Mode: testbed.ModeNode, Log: os.Stderr, ProxyBinary: o.criProxy,
		KeepLogs: func() bool { return err != nil && ctx.Err() == nil }})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.bed.Close(context.WithoutCancel(ctx))) }()
	admin, err := grpc.NewClient("unix://"+b.bed.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer admin.Close()
	runtimeConn, err := grpc.NewClient("unix://"+b.bed.RuntimeSocket,
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer runtimeConn.Close()
	b.pulls, b.cri, b.conn = opsv1.NewImagesClient(admin), runtimeapi.NewImageServiceClient(runtimeConn), runtimeConn
	if b.image, err = pushLarge(ctx, b.bed, "1", o.layers, o.mib); err != nil {
		return err
	}
	r.MiB = b.image.mib()
	// The first round of each warms up: the registry's files come from the disk.
	for round := range o.rounds + 1 {
		ways := []func(context.Context) (time.Duration, error){b.ahead, b.direct}
		first := rand.IntN(2) //nolint:gosec // which comes first is no secret
		var took [2]time.Duration
		for _, i := range []int{first, 1 - first} {
			if took[i], err = ways[i](ctx); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
			if err := b.image.remove(ctx, b.conn); err != nil {
				return fmt.Errorf("round %d: remove the image: %w", round, err)
			}
		}
		if round == 0 {
			continue
		}
		fmt.Fprintf(os.Stderr, "round %d: cri-proxy %s, containerd %s\n", round, took[0].Round(time.Millisecond),
			took[1].Round(time.Millisecond))
		r.Ahead, r.Direct = append(r.Ahead, took[0].Seconds()), append(r.Direct, took[1].Seconds())
	}
	r.LoadAfter = load()
	r.finish()
	r.print(os.Stdout)
	if o.out == "" {
		return nil
	}
	j, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(o.out, append(j, '\n'), 0o644) //nolint:gosec // for everybody to read
}

// ahead pulls the image through cri-proxy, without a limit, and returns how long it took.
func (b *pullBench) ahead(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	op, err := b.pulls.Pull(ctx, &opsv1.PullRequest{Uid: fmt.Sprintf("bench-%d", began.UnixNano()), Image: b.image.ref})
	if err != nil {
		return 0, err
	}
	watch, err := b.pulls.WatchPull(ctx, &opsv1.WatchPullRequest{Uid: op.GetUid()})
	if err != nil {
		return 0, err
	}
	for op.GetFinishTime() == nil {
		if op, err = watch.Recv(); err != nil {
			return 0, err
		}
	}
	took := time.Since(began)
	if op.GetReason() != "Pulled" {
		return 0, fmt.Errorf("pull has ended with %s %s: %s", op.GetPhase(), op.GetReason(), op.GetMessage())
	}
	return took, nil
}

// direct lets containerd pull the image, as kubelet and crictl do.
func (b *pullBench) direct(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	_, err := b.cri.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: b.image.ref},
		SandboxConfig: &runtimeapi.PodSandboxConfig{}})
	return time.Since(began), err
}

func (r *PullReport) finish() {
	ratios := make([]float64, len(r.Ahead))
	for i := range r.Ahead {
		ratios[i] = r.Direct[i] / r.Ahead[i]
	}
	slices.Sort(ratios)
	r.RatioLow, r.Ratio, r.RatioHigh = ratios[len(ratios)/4], ratios[len(ratios)/2], ratios[len(ratios)*3/4]
	r.Met = r.Ratio >= pullGoal
}

func (r *PullReport) print(w io.Writer) {
	mean := func(seconds []float64) (median, rate float64) {
		s := slices.Sorted(slices.Values(seconds))
		median = s[len(s)/2]
		return median, r.MiB / median
	}
	ours, ourRate := mean(r.Ahead)
	theirs, theirRate := mean(r.Direct)
	met := "met"
	if !r.Met {
		met = "MISSED"
	}
	fmt.Fprintf(w, "%.0f MiB in %d layers, %d rounds, load before %s, after %s\n", r.MiB, r.Layers, len(r.Ahead),
		r.LoadBefore, r.LoadAfter)
	fmt.Fprintf(w, "cri-proxy, pre-pull      median %.2f s  %.0f MiB/s\nPullImage on containerd  median %.2f s  %.0f "+
		"MiB/s\n", ours, ourRate, theirs, theirRate)
	fmt.Fprintf(w, "%-6s  throughput %.3f of the direct one's, median of the rounds; quartiles %.3f … %.3f (goal ≥ "+
		"%g)\n", met, r.Ratio, r.RatioLow, r.RatioHigh, pullGoal)
}
