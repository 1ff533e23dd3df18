// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// yields is how many times pulls of ours have been cut off for kubelet's.
func yields(t testing.TB) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+bed.MetricsAddress+"/metrics", nil)
	must(t, err)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if n, ok := strings.CutPrefix(lines.Text(), "criproxy_pull_yields_total "); ok {
			v, err := strconv.ParseFloat(n, 64)
			must(t, err)
			return int(v)
		}
	}
	t.Fatal("no such metric")
	return 0
}

// keepPulling has kubelet pull the images again and again, until the test or what is returned ends
// it. One that takes longer than timeout is given up.
func keepPulling(t testing.TB, timeout, pause time.Duration, images ...string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var all sync.WaitGroup
	for _, image := range images {
		all.Go(func() {
			for ctx.Err() == nil {
				one, end := context.WithTimeout(ctx, timeout)
				_, _ = bed.kubelet.PullImage(one, &runtimeapi.PullImageRequest{Image: spec(image)})
				end()
				select {
				case <-time.After(pause):
				case <-ctx.Done():
				}
			}
		})
	}
	stop = sync.OnceFunc(func() {
		cancel()
		all.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// late answers for a front with each request so much later, under a host name of its own.
func late(t testing.TB, f *front, host string, by time.Duration) {
	t.Helper()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: f.addr})
	proxy.ErrorHandler = func(http.ResponseWriter, *http.Request, error) {}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(by):
			proxy.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(s.Close)
	must(t, bed.MapRegistry(host, s.URL))
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Join(bed.RegistryHostsDir(), host)) })
}

// broken begins twelve pulls of kubelet's, each for a reason of its own, and goes on with them.
func broken(t testing.TB) (stop func()) {
	t.Helper()
	hangs, gone, stuck, slow := newFront(t, "hangs.test"), newFront(t, "gone.test"), newFront(t, "stuck.test"),
		newFront(t, "trickles.test")
	hangs.freeze()
	gone.answer(http.StatusNotFound, -1)
	late(t, gone, "late.test", 400*time.Millisecond)
	slow.throttle(128 << 10)
	var images []string
	for i := range 3 {
		p := push(t, fmt.Sprintf("stuck:%d", i), 1, 4)
		stuck.hold(p, 5)
		q := push(t, fmt.Sprintf("trickles:%d", i), 1, 8)
		images = append(images, hangs.image(fmt.Sprintf("hangs:%d", i)), fmt.Sprintf("late.test/late:%d", i),
			stuck.image(p.name), slow.image(q.name))
	}
	stop = keepPulling(t, 10*time.Minute, 500*time.Millisecond, images...)
	eventually(t, func() error {
		// containerd has three download slots for all.
		if n := stuck.sending.Load() + slow.sending.Load(); hangs.requests.Load() == 0 || gone.requests.Load() < 3 ||
			n < 3 {
			return fmt.Errorf("not all begun: %d layers", n)
		}
		return nil
	})
	return stop
}

// timed pulls an image and returns how long it took.
func timed(t testing.TB, image string) time.Duration {
	t.Helper()
	op := succeeds(t, begin(t, &opsv1.PullRequest{Image: image}))
	return op.GetFinishTime().AsTime().Sub(op.GetCreateTime().AsTime())
}

// noSlower holds a ratio to its bound where images have their full size: small ones are done before
// they can be measured.
func noSlower(t testing.TB, what string, took, alone time.Duration, most float64) {
	t.Helper()
	ratio := took.Seconds() / alone.Seconds()
	t.Logf("%s: %s, alone %s: x%.2f", what, took.Round(time.Millisecond), alone.Round(time.Millisecond), ratio)
	if full() && ratio > most {
		t.Errorf("%s takes %.2f times as long", what, ratio)
	}
}

// TestBrokenPulls has twelve pods on the node whose images cannot be pulled.
func TestBrokenPulls(t *testing.T) {
	f := newFront(t, "works.test")
	idle, beside := push(t, "idle:1", 8, layerMiB(8)), push(t, "beside:1", 8, layerMiB(8))
	upgrade, another := push(t, "upgrade:1", 4, 4), push(t, "upgrade:2", 4, 4)
	f.throttle(wire)
	alone := timed(t, f.image(idle.name))
	_, err := bed.direct.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(upgradeOf)})
	must(t, err)
	// which brings the sandbox image too: it would wait for a slot
	upgraded(t, "alone", f.image(push(t, "upgrade:0", 4, 4).name))
	stop := broken(t)
	before := yields(t)
	took := timed(t, f.image(beside.name))
	n := yields(t) - before
	t.Logf("%d yields", n)
	// one to find out, every 20 s; on a busy machine ours may get no more than a trickle
	if full() && n > 1+int(took/(20*time.Second)) {
		t.Errorf("cut off %d times for nothing", n)
	}
	noSlower(t, "a job beside broken pulls", took, alone, 1.5)
	f.throttle(0)
	upgraded(t, "beside-broken", f.image(upgrade.name))
	stop()

	// And one that works: the job yields, the upgrade does not.
	kubelets, job := newFront(t, "kubelets-too.test"), newFront(t, "job.test")
	p, q := push(t, "kubelets-too:1", 2, 64), push(t, "job:1", 4, 8)
	kubelets.throttle(16 * mib)
	job.throttle(16 * mib)
	// The job finds kubelet's under way and does not end before it has seen bytes of it; that does
	// not end before the upgrade.
	kubelets.hold(p, 0)
	job.hold(q, 5)
	pulling := keepPulling(t, 10*time.Minute, time.Minute, kubelets.image(p.name))
	eventually(t, func() error {
		if kubelets.sending.Load() == 0 {
			return errors.New("kubelet's pull has not come to its layers")
		}
		return nil
	})
	uid := begin(t, &opsv1.PullRequest{Image: job.image(q.name)})
	follow(t, uid, func(op *opsv1.PullOperation) bool { return op.GetBytesDone() >= mib })
	kubelets.hold(p, 9)
	follow(t, uid, func(op *opsv1.PullOperation) bool { return op.GetReason() == "YieldsToKubelet" })
	upgraded(t, "beside-works", f.image(another.name))
	t.Logf("kubelet's pull had %d %% when the upgrade had all", 100*kubelets.bytes.Load()/p.size)
	pulling()
	job.goOn()
	if op := succeeds(t, uid); op.GetAttempt() != 1 {
		t.Errorf("%v", op)
	}
}

// upgradeOf is what runs before.
const upgradeOf = "nginx:latest"

// upgraded prepares an upgrade of a container of a pod to the image, which must be pulled without
// giving way to anybody.
func upgraded(t testing.TB, uid, image string) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+bed.ProxySocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	admin, err := grpc.NewClient("unix://"+bed.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer admin.Close()
	rt, ops := runtimeapi.NewRuntimeServiceClient(conn), opsv1.NewOpsClient(admin)
	old := present(t, upgradeOf)
	labels := map[string]string{"io.kubernetes.pod.name": uid, "io.kubernetes.pod.namespace": "default",
		"io.kubernetes.pod.uid": uid, "io.kubernetes.container.name": "app"}
	sandbox := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: uid, Uid: uid, Namespace: "default"},
		LogDirectory: filepath.Join(bed.PodLogs, uid), Labels: labels,
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: bed.CgroupParent},
	}
	pod, err := rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: sandbox})
	must(t, err)
	defer func() {
		ctx := context.WithoutCancel(t.Context())
		_, _ = rt.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod.GetPodSandboxId()})
		_, _ = rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod.GetPodSandboxId()})
		_, _ = bed.direct.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: spec(image)})
	}()
	made, err := rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod.GetPodSandboxId(),
		SandboxConfig: sandbox, Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "app"}, Image: spec(old.GetId()), LogPath: "app.log",
			Labels: labels,
			Annotations: map[string]string{"io.kubernetes.container.hash": "1",
				"io.kubernetes.container.restartCount": "0"},
		}})
	must(t, err)
	_, err = rt.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: made.GetContainerId()})
	must(t, err)
	began := time.Now()
	req := &opsv1.PrepareUpgradeRequest{
		Uid: uid, Pod: &opsv1.PodRef{Namespace: "default", Name: uid, Uid: uid}, Requester: "test",
		Containers: []*opsv1.ContainerUpgrade{{Name: "app", Image: image}},
	}
	_, err = ops.PrepareUpgrade(t.Context(), req)
	must(t, err)
	eventually(t, func() error {
		op, err := ops.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: req.GetUid()})
		must(t, err)
		pull := op.GetContainers()[0].GetPull()
		if pull.GetReason() == "YieldsToKubelet" {
			t.Errorf("the upgrade waits: %v", pull)
		}
		if pull.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED {
			return fmt.Errorf("%v", op)
		}
		return nil
	})
	t.Logf("the upgrade's image was there after %s", time.Since(began).Round(time.Millisecond))
	_, _ = ops.AbortUpgrade(t.Context(), &opsv1.AbortUpgradeRequest{Uid: req.GetUid()})
}

// TestKubeletIsNotSlower has kubelet pull over the same line as ours.
func TestKubeletIsNotSlower(t *testing.T) {
	f, g, first := newFront(t, "line-ours.test"), newFront(t, "line-kubelets.test"), newFront(t, "line-alone.test")
	alone, beside, ours := push(t, "line:1", 8, layerMiB(8)), push(t, "line:2", 8, layerMiB(8)),
		push(t, "line:3", 8, layerMiB(16))
	f.throttle(wire)
	g.limit.Store(f.limit.Load()) // one line
	first.limit.Store(f.limit.Load())
	pull := func(image string) (time.Duration, error) {
		began := time.Now()
		_, err := bed.kubelet.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(image)})
		return time.Since(began), err
	}
	for _, image := range []string{first.image(alone.name), g.image(beside.name)} {
		t.Cleanup(func() {
			_, _ = bed.direct.RemoveImage(context.WithoutCancel(t.Context()),
				&runtimeapi.RemoveImageRequest{Image: spec(image)})
		})
	}
	took, err := pull(first.image(alone.name))
	must(t, err)
	// Neither ends before it has met the other, however late that comes.
	f.hold(ours, 9)
	g.hold(beside, 9)
	before := yields(t)
	uid := begin(t, &opsv1.PullRequest{Image: f.image(ours.name)})
	follow(t, uid, func(op *opsv1.PullOperation) bool {
		return op.GetBytesTotal() > 0 && op.GetBytesDone() > op.GetBytesTotal()/8
	})
	var met time.Duration
	pulled := make(chan error, 1)
	go func() {
		var err error
		met, err = pull(g.image(beside.name))
		pulled <- err
	}()
	follow(t, uid, func(op *opsv1.PullOperation) bool { return op.GetReason() == "YieldsToKubelet" })
	g.goOn()
	must(t, <-pulled)
	noSlower(t, "kubelet's pull beside a job", met, took, 1.05)
	f.goOn()
	succeeds(t, uid)
	if n := yields(t) - before; n < 1 || full() && n > 2 {
		t.Errorf("%d yields", n)
	}
	fetchedOnce(t, f, ours)
}

// TestShortPulls has kubelet ask again and again for what is there, over a long round trip.
func TestShortPulls(t *testing.T) {
	f, there := newFront(t, "long.test"), newFront(t, "there.test")
	idle, beside := push(t, "long:1", 8, layerMiB(8)), push(t, "long:2", 8, layerMiB(8))
	late(t, there, "far.test", 400*time.Millisecond)
	var images []string
	for i := range 3 {
		p := push(t, fmt.Sprintf("far:%d", i), 1, 1)
		images = append(images, "far.test/"+p.name)
		_, err := bed.kubelet.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(images[i])})
		must(t, err)
		t.Cleanup(func() {
			_, _ = bed.direct.RemoveImage(context.WithoutCancel(t.Context()),
				&runtimeapi.RemoveImageRequest{Image: spec(images[i])})
		})
	}
	f.throttle(wire)
	alone := timed(t, f.image(idle.name))
	stop := keepPulling(t, time.Minute, 100*time.Millisecond, images...)
	before := yields(t)
	took := timed(t, f.image(beside.name))
	if n := yields(t) - before; n != 0 {
		t.Errorf("cut off %d times for what is there", n)
	}
	stop()
	noSlower(t, "a job beside short pulls", took, alone, 1.5)
}

// TestKubeletWantsALayer has kubelet pull another image with a layer that ours is fetching slowly.
func TestKubeletWantsALayer(t *testing.T) {
	f := newFront(t, "base.test")
	p := push(t, "base:1", 2, 48)
	other := pushPart(t, p, "base:2")
	const limit = mib / 2 // for kubelet's it would be a minute and a half
	f.hold(p, 4)          // less than the layer, so that both are under way until we have looked
	uid := begin(t, &opsv1.PullRequest{Image: f.image(p.name), BytesPerSecond: limit})
	follow(t, uid, func(op *opsv1.PullOperation) bool { return op.GetBytesDone() >= mib })
	began := time.Now()
	pulled := make(chan error, 1)
	go func() {
		_, err := bed.kubelet.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(f.image(other.name))})
		pulled <- err
	}()
	op := follow(t, uid, func(op *opsv1.PullOperation) bool { return op.GetReason() == "YieldsToKubelet" })
	if !strings.Contains(op.GetMessage(),
		"yields to kubelet's pull of another image, which wants the same layers, since ") ||
		!strings.HasSuffix(op.GetMessage(), "in any case") {
		t.Errorf("%v", op)
	}
	f.goOn()
	must(t, <-pulled)
	t.Cleanup(func() {
		_, _ = bed.direct.RemoveImage(context.WithoutCancel(t.Context()),
			&runtimeapi.RemoveImageRequest{Image: spec(f.image(other.name))})
	})
	took, atLimit := time.Since(began), time.Duration(float64(other.size)/limit*float64(time.Second))
	t.Logf("kubelet's pull took %s; at the limit it would have been %s", took.Round(time.Millisecond),
		atLimit.Round(time.Millisecond))
	if took > atLimit/2 {
		t.Errorf("kubelet's pull took %s, nearly as long as at our limit", took)
	}
	_, err := bed.pulls.CancelPull(t.Context(), &opsv1.CancelPullRequest{Uid: uid}) // the rest takes long
	must(t, err)
}

// pushPart pushes an image of the first layer of another, in the same repository.
func pushPart(t testing.TB, of pushed, name string) pushed {
	t.Helper()
	repository, tag, _ := strings.Cut(of.name, ":")
	get := func(path string, into any) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet,
			fmt.Sprintf("http://%s/v2/%s/%s", bed.Registry, repository, path), nil)
		must(t, err)
		req.Header.Set("Accept", ocispec.MediaTypeImageManifest)
		resp, err := http.DefaultClient.Do(req)
		must(t, err)
		defer resp.Body.Close()
		must(t, json.NewDecoder(resp.Body).Decode(into))
	}
	var m ocispec.Manifest
	var config ocispec.Image
	get("manifests/"+tag, &m)
	get("blobs/"+m.Config.Digest.String(), &config)
	m.Layers, config.RootFS.DiffIDs = m.Layers[:1], config.RootFS.DiffIDs[:1]
	raw, err := json.Marshal(config)
	must(t, err)
	m.Config = descriptor(m.Config.MediaType, raw)
	putBlob(t, repository, m.Config.Digest, raw)
	raw, err = json.Marshal(m)
	must(t, err)
	_, tag, _ = strings.Cut(name, ":")
	send(t, http.MethodPut, fmt.Sprintf("http://%s/v2/%s/manifests/%s", bed.Registry, repository, tag),
		m.MediaType, raw)
	return pushed{name: name, digest: descriptor("", raw).Digest, size: m.Layers[0].Size}
}

func descriptor(mediaType string, raw []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
}
