// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// transcript is what a client saw, with everything replaced that differs from run to run.
type transcript struct {
	lines []string
}

// What differs: 64-digit IDs, times in nanoseconds, addresses, ports and tokens of
// streaming URLs, names that the test numbers, measured figures.
var variable = []struct {
	re *regexp.Regexp
	by string
}{
	{regexp.MustCompile(`[0-9a-f]{64}`), "ID"},
	{regexp.MustCompile(`"?1[0-9]{18}"?`), "TIME"},
	{regexp.MustCompile(`127\.0\.0\.1:[0-9]+/(exec|attach|portforward)/[A-Za-z0-9_-]{8}`), "STREAM/$1"},
	{regexp.MustCompile(`198\.1[89]\.[0-9]+\.[0-9]+`), "IP"},
	{regexp.MustCompile(`(pod|uid)-[0-9]+(-[0-9]+)?`), "NAME"},
	{regexp.MustCompile(`[0-9T:.-]+Z`), "DATE"},
	{regexp.MustCompile(
		`"(usageNanoCores|usageCoreNanoSeconds|workingSetBytes|rssBytes|usageBytes|availableBytes|pageFaults|majorPageFaults|value|usedBytes|inodesUsed|pid)":"?[0-9]+"?|\{"value":"[0-9]+"\}`), "FIGURE"},
}

func (tr *transcript) note(what string, m proto.Message, err error) {
	line := what + ": "
	if err != nil {
		st := status.Convert(err)
		line += fmt.Sprintf("%s %q %v", st.Code(), st.Message(), st.Details())
	} else {
		b, _ := protojson.Marshal(m)
		line += strings.ReplaceAll(string(b), " ", "") // protojson adds spaces at random
	}
	for _, v := range variable {
		line = v.re.ReplaceAllString(line, v.by)
	}
	tr.lines = append(tr.lines, line)
}

func (tr *transcript) text(what, s string) {
	tr.lines = append(tr.lines, what+": "+s)
}

// TestSameAnswers runs one script directly on containerd and through the proxy:
// a client cannot tell which it talks to.
func TestSameAnswers(t *testing.T) {
	n := startNode(t)
	direct, proxied := everything(t, n.direct), everything(t, n.kubelet)
	if len(direct) != len(proxied) {
		t.Fatalf("%d lines direct, %d proxied", len(direct), len(proxied))
	}
	for i := range direct {
		if direct[i] != proxied[i] {
			t.Errorf("line %d\n direct %s\nproxied %s", i, direct[i], proxied[i])
		}
	}
	t.Logf("%d answers are equal", len(direct))
}

// everything makes each kind of call that kubelet or crictl makes.
func everything(t *testing.T, k *kubelet) []string {
	t.Helper()
	ctx := t.Context()
	tr := &transcript{}
	image := &runtimeapi.ImageSpec{Image: bed.extra}

	note := func(what string, m proto.Message, err error) { tr.note(what, m, err) }
	version, err := k.Version(ctx, &runtimeapi.VersionRequest{})
	note("Version", version, err)
	st, err := k.Status(ctx, &runtimeapi.StatusRequest{})
	note("Status", st, err)
	rc, err := k.RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
	note("RuntimeConfig", rc, err)
	urc, err := k.UpdateRuntimeConfig(ctx,
		&runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{}})
	note("UpdateRuntimeConfig", urc, err)

	// Images.
	is, err := k.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: image})
	note("ImageStatus absent", is, err)
	pull, err := k.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: image})
	note("PullImage", pull, err)
	is, err = k.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: image, Verbose: true})
	note("ImageStatus", is, err)
	// containerd lists all images whatever the filter says; those of other tests come and go.
	listed := func(what string) {
		m, err := k.images.ListImages(ctx, &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: image}})
		m.Images = slices.DeleteFunc(m.GetImages(),
			func(i *runtimeapi.Image) bool { return !slices.Contains(i.GetRepoTags(), image.GetImage()) })
		note(what, m, err)
	}
	listed("ListImages")
	ri, err := k.images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: image})
	note("RemoveImage", ri, err)
	listed("ListImages after")
	pull, err = k.images.PullImage(ctx,
		&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: bed.extra + "-absent"}})
	note("PullImage absent", pull, err)

	// Pod and containers.
	p := k.runPod(t)
	ps, err := k.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
	note("PodSandboxStatus", ps, err)
	lp, err := k.ListPodSandbox(ctx,
		&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: p.sandbox}})
	note("ListPodSandbox", lp, err)
	request := p.request(t, spec{name: "app", command: looping, env: map[string][]byte{"A": []byte("b")}}, 0)
	created, err := k.CreateContainer(ctx, request)
	note("CreateContainer", created, err)
	again, err := k.CreateContainer(ctx, request)
	note("CreateContainer again", again, err)
	id := created.GetContainerId()
	cs := func(what string) {
		m, err := k.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		note("ContainerStatus "+what, m, err)
		l, err := k.ListContainers(ctx,
			&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.sandbox}})
		note("ListContainers "+what, l, err)
	}
	cs("created")
	start, err := k.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	note("StartContainer", start, err)
	cs("running")
	start, err = k.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	note("StartContainer again", start, err)
	ucr, err := k.UpdateContainerResources(ctx,
		&runtimeapi.UpdateContainerResourcesRequest{ContainerId: id,
			Linux: &runtimeapi.LinuxContainerResources{CpuShares: 200}})
	note("UpdateContainerResources", ucr, err)
	cs("updated")

	// Exec, attach, port-forward, logs.
	for _, cmd := range [][]string{{"sh", "-c", "echo out; echo err >&2; exit 3"}, {"no-such-command"}} {
		es, err := k.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: cmd, Timeout: 10})
		note("ExecSync", es, err)
	}
	es, err := k.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sleep", "30"}, Timeout: 1})
	tr.text("ExecSync timeout", fmt.Sprint(es, status.Code(err)))
	exec, err := k.Exec(ctx,
		&runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"sh", "-c", "cat; echo err >&2; exit 4"}, Stdin: true,
			Stdout: true, Stderr: true})
	note("Exec", exec, err)
	tr.text("exec stream", stream(t, exec.GetUrl(), "typed\n", true))
	attach, err := k.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: id, Stdout: true})
	note("Attach", attach, err)
	pf, err := k.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: p.sandbox})
	note("PortForward", pf, err)
	tr.text("port-forward stream", forwarded(t, k, p, pf.GetUrl()))
	rl, err := k.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
	note("ReopenContainerLog", rl, err)
	eventually(t, "the log has a line", func() bool {
		b, _ := os.ReadFile(filepath.Join(p.config.GetLogDirectory(), "app", "0.log"))
		return strings.Contains(string(b), "started")
	})

	// Stats and metrics.
	stats, err := k.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
	tr.text("ContainerStats", fmt.Sprint(stats.GetStats().GetAttributes().GetMetadata(), status.Code(err)))
	ls, err := k.ListContainerStats(ctx,
		&runtimeapi.ListContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: p.sandbox}})
	tr.text("ListContainerStats", fmt.Sprint(len(ls.GetStats()), status.Code(err)))
	pss, err := k.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.sandbox})
	tr.text("PodSandboxStats", fmt.Sprint(len(pss.GetStats().GetLinux().GetContainers()), status.Code(err)))
	lps, err := k.ListPodSandboxStats(ctx,
		&runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: p.sandbox}})
	tr.text("ListPodSandboxStats", fmt.Sprint(len(lps.GetStats()), status.Code(err)))
	lmd, err := k.ListMetricDescriptors(ctx, &runtimeapi.ListMetricDescriptorsRequest{})
	slices.SortFunc(lmd.Descriptors,
		func(a, b *runtimeapi.MetricDescriptor) int { return strings.Compare(a.GetName(), b.GetName()) })
	note("ListMetricDescriptors", lmd, err)
	fs, err := k.images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	tr.text("ImageFsInfo", fmt.Sprint(len(fs.GetImageFilesystems()), status.Code(err)))

	// Streaming lists, as far as the runtime has them.
	tr.text("StreamContainers",
		received(k.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{Filter: &runtimeapi.ContainerFilter{
			PodSandboxId: p.sandbox,
			State:        &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
		}})))
	tr.text("StreamContainers exited",
		received(k.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{Filter: &runtimeapi.ContainerFilter{
			PodSandboxId: p.sandbox,
			State:        &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_EXITED},
		}})))
	tr.text("StreamPodSandboxes",
		received(k.StreamPodSandboxes(ctx,
			&runtimeapi.StreamPodSandboxesRequest{Filter: &runtimeapi.PodSandboxFilter{Id: p.sandbox}})))
	tr.text("StreamImages",
		received(k.images.StreamImages(ctx,
			&runtimeapi.StreamImagesRequest{
				Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: bed.busybox}}})))
	tr.text("StreamContainerStats",
		received(k.StreamContainerStats(ctx,
			&runtimeapi.StreamContainerStatsRequest{
				Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: p.sandbox}})))
	tr.text("StreamPodSandboxStats",
		received(k.StreamPodSandboxStats(ctx,
			&runtimeapi.StreamPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: p.sandbox}})))

	// The end.
	stop, err := k.StopContainer(ctx, stopRequest(id, 5))
	note("StopContainer", stop, err)
	stop, err = k.StopContainer(ctx, stopRequest(id, 5))
	note("StopContainer again", stop, err)
	cs("exited")
	es, err = k.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}})
	note("ExecSync exited", es, err)
	rm, err := k.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
	note("RemoveContainer", rm, err)
	rm, err = k.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
	note("RemoveContainer again", rm, err)
	cs("removed")
	sp, err := k.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
	note("StopPodSandbox", sp, err)
	eventually(t, "the CRI plugin knows that the sandbox has ended", func() bool { // it learns of it beside the call
		l, err := k.ListPodSandbox(ctx,
			&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: p.sandbox}})
		return err == nil && len(l.GetItems()) == 1 &&
			l.GetItems()[0].GetState() == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	})
	created, err = k.CreateContainer(ctx, p.request(t, spec{name: "late", command: looping}, 0))
	note("CreateContainer in a stopped pod", created, err)
	rp, err := k.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
	note("RemovePodSandbox", rp, err)
	lp, err = k.ListPodSandbox(ctx,
		&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: p.sandbox}})
	note("ListPodSandbox after", lp, err)

	// Unknown to the runtime: it must be the one that says so.
	for _, method := range []string{"/runtime.v1.RuntimeService/NoSuchMethod", "/no.such.Service/Method"} {
		note(method, nil, k.conn.Invoke(ctx, method, &runtimeapi.VersionRequest{}, &runtimeapi.VersionResponse{}))
	}
	return tr.lines
}

// received drains a server stream and says how many messages came and how it ended.
func received[M any](s grpc.ServerStreamingClient[M], err error) string {
	n := 0
	for err == nil {
		if _, err = s.Recv(); err == nil {
			n++
		}
	}
	if errors.Is(err, io.EOF) {
		return fmt.Sprint(n, " ", codes.OK)
	}
	return fmt.Sprint(n, " ", status.Convert(err).Code(), " ", status.Convert(err).Message())
}

// stream runs an exec session over the runtime's own streaming server.
func stream(t *testing.T, rawURL, stdin string, stderr bool) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	must(t, err)
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{Host: u.Host}, http.MethodPost, u)
	must(t, err)
	var out, errOut bytes.Buffer
	o := remotecommand.StreamOptions{Stdin: strings.NewReader(stdin), Stdout: &out}
	if stderr {
		o.Stderr = &errOut
	}
	err = executor.StreamWithContext(t.Context(), o)
	return fmt.Sprintf("%q %q %v", out.String(), errOut.String(), err)
}

// forwarded asks an app in the pod through the runtime's port forwarding.
func forwarded(t *testing.T, k *kubelet, p *pod, rawURL string) string {
	t.Helper()
	web := p.run(t, spec{name: "web", image: bed.app})
	defer func() {
		_, err := k.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: web})
		must(t, err)
	}()
	// A connection that is refused ends the whole session, so the app must listen before.
	st, err := k.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
	must(t, err)
	get := func(address string) (string, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+"/healthz", nil)
		must(t, err)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return "", err
		}
		b, err := io.ReadAll(resp.Body)
		return fmt.Sprint(resp.StatusCode, " ", string(b)), errors.Join(err, resp.Body.Close())
	}
	eventually(t, "the app listens", func() bool {
		_, err := get(net.JoinHostPort(st.GetStatus().GetNetwork().GetIp(), "8080"))
		return err == nil
	})
	u, err := url.Parse(rawURL)
	must(t, err)
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{Host: u.Host})
	must(t, err)
	stop, listening := make(chan struct{}), make(chan struct{})
	f, err := portforward.New(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, u),
		[]string{"0:8080"}, stop, listening, io.Discard, io.Discard)
	must(t, err)
	done := make(chan error, 1)
	go func() { done <- f.ForwardPorts() }()
	defer func() { close(stop); <-done }()
	select {
	case <-listening:
	case err := <-done:
		t.Fatal(err)
	}
	ports, err := f.GetPorts()
	must(t, err)
	body, err := get(fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
	must(t, err)
	return body
}

// TestAttach attaches through the proxy to a container that is then restarted: the
// session ends with the container it belongs to.
func TestAttach(t *testing.T) {
	n := startNode(t)
	p := n.runPod(t)
	id := p.run(t,
		spec{name: "app",
			command: []string{"sh", "-c", "trap 'echo leaving; exit 0' TERM; while :; do echo tick; sleep 0.05; done"}})
	attach, err := n.Attach(t.Context(), &runtimeapi.AttachRequest{ContainerId: id, Stdout: true})
	must(t, err)
	u, err := url.Parse(attach.GetUrl())
	must(t, err)
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{Host: u.Host}, http.MethodPost, u)
	must(t, err)
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := executor.StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdout: w})
		_ = w.Close()
		done <- err
	}()
	tick := make([]byte, 5)
	_, err = io.ReadFull(r, tick)
	must(t, err)
	op := n.begin(t, p, restartOf("app"))
	rest, err := io.ReadAll(r)
	must(t, err)
	if !strings.Contains(string(tick)+string(rest), "leaving") {
		t.Errorf("attached until %q", rest)
	}
	must(t, <-done)
	n.wait(t, op)
}

// TestSameEvents subscribes directly and through the proxy: both get the same events.
func TestSameEvents(t *testing.T) {
	n := startNode(t)
	subscribe := func(k *kubelet) <-chan string {
		ctx, cancel := context.WithCancel(t.Context())
		t.Cleanup(cancel)
		s, err := k.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
		must(t, err)
		// containerd keeps the events of five minutes in which nobody listens, sends them to the
		// first who does, and does nothing else before they are taken (internal/eventq): so they
		// are, however many tests have run before.
		out := make(chan string, 1<<16)
		go func() {
			defer close(out)
			for {
				e, err := s.Recv()
				if err != nil {
					return
				}
				b, _ := proto.MarshalOptions{Deterministic: true}.Marshal(e)
				out <- e.GetPodSandboxStatus().GetMetadata().GetUid() + " " + e.GetContainerEventType().String() + " " +
					e.GetContainerId() + fmt.Sprintf(" %x", b)
			}
		}()
		return out
	}
	direct, proxied := subscribe(n.direct), subscribe(n.kubelet)
	// A subscription takes effect on the runtime's side some time after the call; events of a first
	// pod tell when.
	collect := func(c <-chan string, uid, last string) []string {
		var all []string
		timeout := time.After(30 * time.Second)
		for {
			select {
			case e := <-c:
				if strings.HasPrefix(e, uid+" ") {
					all = append(all, e)
				}
				if strings.HasPrefix(e, uid+" "+last) {
					return all
				}
			case <-timeout:
				t.Fatalf("no %s of %s; so far %d events", last, uid, len(all))
			}
		}
	}
	arrives := func(c <-chan string, uid string) bool {
		timeout := time.After(time.Second)
		for {
			select {
			case e := <-c:
				if strings.HasPrefix(e, uid+" ") {
					return true
				}
			case <-timeout:
				return false
			}
		}
	}
	eventually(t, "both subscriptions have taken effect", func() bool {
		first := n.runPod(t)
		a, b := arrives(direct, first.uid), arrives(proxied, first.uid)
		return a && b
	})
	p := n.runPod(t)
	id := p.run(t, spec{name: "app", command: looping})
	_, err := n.StopContainer(t.Context(), stopRequest(id, 5))
	must(t, err)
	_, err = n.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: id})
	must(t, err)
	const last = "CONTAINER_DELETED_EVENT"
	a, b := collect(direct, p.uid, last), collect(proxied, p.uid, last)
	if len(a) == 0 || strings.Join(a, "\n") != strings.Join(b, "\n") {
		t.Errorf("direct %d events, proxied %d", len(a), len(b))
	}
}
