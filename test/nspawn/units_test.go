// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nspawn

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The steps share one machine, and each leaves it with one instance that serves, and kubelet behind
// it.
func TestUnits(t *testing.T) {
	m := newMachine(t)
	for _, c := range []struct {
		name string
		test func(*testing.T, *machine)
	}{
		{"boot order", bootOrder},
		{"sandbox", sandbox},
		{"upgrade", upgrade},
		{"upgrade that fails", upgradeThatFails},
		{"drain", drain},
		{"kill", kill},
		{"watchdog", watchdog},
		{"bypass", bypass},
		{"crash loop", crashLoop},
		{"guard without the binary", guardAlone},
		{"reboot", reboot},
	} {
		ok := t.Run(c.name, func(t *testing.T) {
			began := time.Now()
			c.test(t, m)
			t.Logf("took %s", time.Since(began).Round(time.Millisecond))
		})
		if !ok {
			t.Fatalf("what follows would not tell anything\n%s",
				m.must(t, "journalctl", "--no-pager", "-n", "60", "-o", "short-precise"))
		}
	}
}

// monotonic is a time since boot that systemd tells of a unit.
func monotonic(t *testing.T, m *machine, unit, property string) int {
	t.Helper()
	us, err := strconv.Atoi(m.show(t, unit, property))
	if err != nil || us == 0 {
		t.Fatalf("%s of %s: %d, %v", property, unit, us, err)
	}
	return us
}

func bootOrder(t *testing.T, m *machine) {
	socket := monotonic(t, m, "cri-proxy.socket", "ActiveEnterTimestampMonotonic")
	proxy := monotonic(t, m, "cri-proxy@a.service", "ActiveEnterTimestampMonotonic")
	kubelet := monotonic(t, m, "kubelet.service", "ExecMainStartTimestampMonotonic")
	if socket >= proxy || proxy >= kubelet {
		t.Errorf("the socket came at %d µs, the proxy at %d, kubelet at %d", socket, proxy, kubelet)
	}
	if got := strings.TrimSpace(m.must(t, "readlink",
		"/run/cri-proxy/kubelet.sock")); got != "/run/cri-proxy/cri.sock" {
		t.Errorf("kubelet.sock leads to %s", got)
	}
	m.moreCalls(t)
	m.noFailures(t, time.Time{})
	if calls, _ := m.counted(t); calls < 20 {
		t.Errorf("%d calls through the proxy", calls)
	}
	// The runtime may come and go.
	m.must(t, "systemctl", "restart", "containerd.service")
	if got := m.show(t, "cri-proxy@a.service", "NRestarts"); got != "0" {
		t.Errorf("the proxy went with the runtime: %s restarts", got)
	}
}

// sandbox says how exposed the unit is: a figure to keep an eye on, lower is better.
func sandbox(t *testing.T, m *machine) {
	out := strings.TrimSpace(m.must(t, "systemd-analyze", "security", "--no-pager", "cri-proxy@a.service"))
	last := out[strings.LastIndexByte(out, '\n')+1:]
	t.Log(last)
	_, level, _ := strings.Cut(last, ".service:")
	fields := append(strings.Fields(level), "")
	if figure, err := strconv.ParseFloat(fields[0], 64); err != nil || figure > 4.5 {
		t.Errorf("exposure %v, %v\n%s", figure, err, out)
	}
	// What the machine may write of cgroups, the service may: limits of pods are raised for a
	// while.
	groups := func(pid string) string {
		return m.must(t, "sh", "-c",
			`awk '$5 ~ "^/sys/fs/cgroup(/|$)" && $6 ~ "^rw" { print $5 }' /proc/`+pid+`/mountinfo | sort -u`)
	}
	if got, want := groups(m.show(t, "cri-proxy@a.service", "MainPID")), groups("1"); got != want || want == "" {
		t.Errorf("the service may write to the cgroups at %q, want %q", got, want)
	}
	if got := m.show(t, "cri-proxy@a.service", "OOMScoreAdjust"); got != "-999" {
		t.Errorf("OOMScoreAdjust is %s", got)
	}
	if got := m.show(t, "cri-proxy@a.service", "MemoryMax"); got != strconv.Itoa(512<<20) {
		t.Errorf("MemoryMax is %s", got)
	}
	got := m.show(t, "cri-proxy@a.service", "Environment")
	if !strings.Contains(got, "GOMEMLIMIT=384MiB") || !strings.Contains(got, "CRI_PROXY_CRASHES=5") {
		t.Errorf("Environment is %s", got)
	}
}

// upgrade is the way there and the way back, with a pull under way.
func upgrade(t *testing.T, m *machine) {
	m.freshKubelet(t)
	m.beginPull(t)
	_, old := m.serving(t)
	t.Log(m.must(t, "cri-proxy", "self-update", "--binary", "/shared/cri-proxy-v2"))
	if i, _ := m.serving(t); i != "b" {
		t.Fatalf("%q serves", i)
	}
	m.moreCalls(t)
	r := m.noFailures(t, time.Time{})
	if r.PullsDone != 0 || m.show(t, "cri-proxy@a", "MainPID") != old {
		t.Fatalf("the old process has not waited for the pull: %+v", r)
	}
	if out := m.fails(t, "cri-proxy", "self-update", "--binary", "/shared/cri-proxy"); !strings.Contains(out,
		"still runs (Handed over to process") {
		t.Errorf("a third version while the first one drains: %s", out)
	}
	touch(t, m, "release")
	await(t, "the end of the pull", func() bool { return m.kubelet(t).PullsDone == 1 })
	await(t, "the end of the old process", func() bool { return m.show(t, "cri-proxy@a", "ActiveState") == "inactive" })
	if got := m.show(t, "cri-proxy@a", "Result") + m.show(t, "cri-proxy@a", "NRestarts"); got != "success0" {
		t.Errorf("the old instance: %s", got)
	}
	if got := m.show(t, "cri-proxy@a", "UnitFileState") +
		m.show(t, "cri-proxy@b", "UnitFileState"); got != "disabledenabled" {
		t.Errorf("what starts with the machine: %s", got)
	}
	t.Log(m.must(t, "cri-proxy", "self-update", "--back"))
	if i, _ := m.serving(t); i != "a" {
		t.Fatalf("%q serves", i)
	}
	await(t, "the end of the second instance",
		func() bool { return m.show(t, "cri-proxy@b", "ActiveState") == "inactive" })
	m.moreCalls(t)
	await(t, "the third event stream", func() bool { return m.kubelet(t).Streams >= 3 })
	r = m.noFailures(t, time.Time{})
	if r.Streams != 3 {
		t.Errorf("%d event streams, want one for each process", r.Streams)
	}
	t.Logf("%d calls, none failed, slowest %s", r.Calls, r.Slowest.Round(time.Millisecond))
}

func touch(t *testing.T, m *machine, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(m.shared, name), nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

// upgradeThatFails is one to a version that passes the checks and does not serve.
func upgradeThatFails(t *testing.T, m *machine) {
	m.freshKubelet(t)
	before, pid := m.serving(t)
	t.Log(m.fails(t, "cri-proxy", "self-update", "--binary", "/shared/cri-proxy-bad"))
	if out := m.fails(t, "cri-proxy", "self-update", "--binary", "/bin/true"); !strings.Contains(out,
		"no cri-proxy that runs here") {
		t.Error(out)
	}
	if after, now := m.serving(t); after != before || now != pid {
		t.Errorf("%s (%s) serves, before it was %s (%s)", after, now, before, pid)
	}
	if got := m.show(t, "cri-proxy@b", "ActiveState"); got != "inactive" && got != "failed" {
		t.Errorf("the other instance is %s", got)
	}
	m.moreCalls(t)
	m.noFailures(t, time.Time{})
}

// drain is cut by who wants the next upgrade, and ends by itself after its time.
func drain(t *testing.T, m *machine) {
	config := "/etc/cri-proxy/config.yaml"
	for _, c := range []struct {
		name string
		end  func(old string)
	}{
		{"end-drain", func(old string) {
			t.Log(m.must(t, "cri-proxy", "self-update", "--reload", "--end-drain"))
			await(t, "the other instance", func() bool { s, _ := m.serving(t); return s == old })
		}},
		{"upgradeDrainTimeout", func(string) {}},
	} {
		m.freshKubelet(t)
		if c.name == "upgradeDrainTimeout" { // as the process has it that is to end
			m.must(t, "sed", "-i", "s/^upgradeDrainTimeout: .*/upgradeDrainTimeout: 1s/", config)
			m.must(t, "cri-proxy", "self-update", "--reload")
			await(t, "the end of the instance before", m.oneRuns(t))
		}
		m.beginPull(t)
		old, pid := m.serving(t)
		m.must(t, "cri-proxy", "self-update", "--reload")
		began := time.Now()
		c.end(old)
		await(t, "the end of the process with the pull",
			func() bool { return m.show(t, "cri-proxy@"+old, "MainPID") != pid })
		await(t, "the end of the pull", func() bool { return m.kubelet(t).PullsDone == 1 })
		m.moreCalls(t)
		// It is the pull that was cut, and no other call.
		if r := m.kubelet(t); len(r.Failures) != 1 || r.Failures[0].What != "PullImage" {
			t.Errorf("%s: failed: %+v", c.name, r.Failures)
		}
		t.Logf("%s: the process with the pull has ended after %s", c.name, time.Since(began).Round(time.Millisecond))
		await(t, "the end of the instance before", m.oneRuns(t))
	}
	m.must(t, "sed", "-i", "s/^upgradeDrainTimeout: .*/upgradeDrainTimeout: 30m/", config)
	m.must(t, "cri-proxy", "self-update", "--reload")
	await(t, "the end of the instance before", m.oneRuns(t))
	if i, _ := m.serving(t); i != "a" { // where the next test begins
		m.must(t, "cri-proxy", "self-update", "--reload")
		await(t, "the end of the instance before", m.oneRuns(t))
	}
}

// oneRuns reports whether one instance runs, and no more.
func (m *machine) oneRuns(t *testing.T) func() bool {
	return func() bool {
		s, _ := m.serving(t)
		return s != "" && m.show(t, "cri-proxy@"+map[string]string{"a": "b", "b": "a"}[s], "ActiveState") == "inactive"
	}
}

// guardAlone: with a binary that does not even start, the guard itself leads kubelet past the
// proxy.
func guardAlone(t *testing.T, m *machine) {
	m.freshKubelet(t)
	i, _ := m.serving(t)
	target := strings.TrimSpace(m.must(t, "readlink", "/usr/local/bin/cri-proxy"))
	m.must(t, "ln", "-sfn", "/bin/false", "/usr/local/bin/cri-proxy")
	out := m.must(t, "env", "SERVICE_RESULT=exit-code", "EXIT_CODE=exited", "EXIT_STATUS=1", "CRI_PROXY_CRASHES=1",
		"/usr/local/lib/cri-proxy/crash-guard", i)
	m.must(t, "ln", "-sfn", target, "/usr/local/bin/cri-proxy")
	if !strings.Contains(out, "leading kubelet past cri-proxy") {
		t.Error(out)
	}
	if to := strings.TrimSpace(m.must(t, "readlink",
		"/run/cri-proxy/kubelet.sock")); to != "/run/containerd/containerd.sock" {
		t.Errorf("kubelet.sock leads to %s", to)
	}
	if out := m.must(t, "cri-proxy", "bypass", "status"); !strings.HasPrefix(out, "on, since ") ||
		!strings.Contains(out, "it has ended") {
		t.Error(out)
	}
	m.must(t, "cri-proxy", "bypass", "off", "--restart-kubelet")
	m.moreCalls(t)
	m.noFailures(t, time.Time{})
}

// kill costs the calls in flight, and no other.
func kill(t *testing.T, m *machine) {
	m.freshKubelet(t)
	killed := time.Now()
	i, pid := m.signal(t, "KILL")
	// Until kubelet has seen the end of its connection, its calls go to a process that is dead.
	await(t, "the end of kubelet's stream", func() bool { return m.kubelet(t).StreamEnded.After(killed) })
	since := m.kubelet(t).StreamEnded
	await(t, "the next process", func() bool { s, now := m.serving(t); return s == i && now != pid && now != "0" })
	m.moreCalls(t)
	r := m.noFailures(t, since)
	t.Logf("%d of %d calls in flight were lost, slowest %s", len(r.Failures), r.Calls,
		r.Slowest.Round(time.Millisecond))
}

// watchdog replaces a process that is frozen.
func watchdog(t *testing.T, m *machine) {
	m.freshKubelet(t)
	i, pid := m.signal(t, "STOP")
	began := time.Now()
	await(t, "the next process", func() bool { s, now := m.serving(t); return s == i && now != pid && now != "0" })
	took := time.Since(began)
	await(t, "the journal to say that it was the watchdog", func() bool {
		return strings.Contains(m.must(t, "journalctl", "--no-pager", "-u", "cri-proxy@"+i), "Watchdog timeout")
	})
	m.moreCalls(t)
	m.noFailures(t, began.Add(took)) // those that came meanwhile went to the frozen process
	t.Logf("replaced after %s, with WatchdogSec=3s", took.Round(time.Millisecond))
}

// bypass is the way out of kubelet's path, and back.
func bypass(t *testing.T, m *machine) {
	m.freshKubelet(t)
	t.Log(m.must(t, "cri-proxy", "bypass", "on", "--reason", "a test"))
	m.moreCalls(t)
	before, why := m.counted(t)
	if !strings.HasSuffix(why, ": a test") {
		t.Errorf("ctl status: %q", why)
	}
	m.moreCalls(t)
	if after, _ := m.counted(t); after != before {
		t.Errorf("%d calls have come through the proxy", after-before)
	}
	if out := m.fails(t, "cri-proxy", "ctl", "restart", "default/pod", "-c", "app"); !strings.Contains(out,
		"cri-proxy is bypassed on this node since ") {
		t.Error(out)
	}
	if out := m.must(t, "cri-proxy", "bypass", "status"); !strings.HasPrefix(out, "on, since ") {
		t.Error(out)
	}
	m.must(t, "cri-proxy", "bypass", "on") // once more does nothing
	m.moreCalls(t)
	r := m.noFailures(t, time.Time{})
	t.Logf("on: %d calls, none failed, slowest %s", r.Calls, r.Slowest.Round(time.Millisecond))
	t.Log(m.must(t, "cri-proxy", "bypass", "off", "--restart-kubelet"))
	m.moreCalls(t)
	m.noFailures(t, time.Time{})
	if after, why := m.counted(t); after == before || why != "" {
		t.Errorf("after bypass off: %d calls, %q", after-before, why)
	}
	if out := m.must(t, "cri-proxy", "bypass", "status"); out != "off\n" {
		t.Error(out)
	}
}

// crashLoop is a version that serves no more: kubelet is led past it.
func crashLoop(t *testing.T, m *machine) {
	m.freshKubelet(t)
	i, _ := m.serving(t)
	instance := "/usr/local/lib/cri-proxy/" + i + "/cri-proxy"
	m.must(t, "rm", "-f", "/run/cri-proxy/crashes") // of the tests before
	m.must(t, "cp", "--remove-destination", "/shared/cri-proxy-bad", instance)
	m.signal(t, "KILL")
	began := time.Now()
	await(t, "the bypass", func() bool {
		return strings.TrimSpace(m.must(t, "readlink",
			"/run/cri-proxy/kubelet.sock")) == "/run/containerd/containerd.sock"
	})
	led := time.Since(began)
	m.moreCalls(t)
	answered := time.Now()
	m.moreCalls(t)
	r := m.noFailures(t, answered)
	t.Logf("kubelet was led past after %s; %d calls failed until it was there, %s after the kill",
		led.Round(time.Millisecond), len(r.Failures), answered.Sub(began).Round(time.Millisecond))
	if out := m.must(t, "cri-proxy", "bypass", "status"); !strings.Contains(out, "it has ended 5 times within 600 s") {
		t.Error(out)
	}
	if out := m.fails(t, "cri-proxy", "bypass", "off"); !strings.Contains(out, "cri-proxy does not serve") {
		t.Error(out)
	}
	m.must(t, "cp", "--remove-destination", "/shared/cri-proxy", instance)
	await(t, "the proxy", func() bool { s, _ := m.serving(t); return s == i })
	since := time.Now()
	t.Log(m.must(t, "cri-proxy", "bypass", "off", "--restart-kubelet"))
	m.moreCalls(t)
	m.noFailures(t, since)
}

// reboot brings the instance that served, and a bypass that was on.
func reboot(t *testing.T, m *machine) {
	m.must(t, "cri-proxy", "self-update", "--binary", "/shared/cri-proxy-v2")
	m.must(t, "cri-proxy", "bypass", "on")
	now := time.Now()
	m.must(t, "systemctl", "reboot", "--no-block")
	select {
	case <-m.ended: // and leaves the start to whoever started it
	case <-time.After(soon):
		t.Fatal("the machine does not go down")
	}
	if err := m.boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, "kubelet", func() bool { r := m.kubelet(t); return r.Started.After(now) && r.Calls > 20 })
	m.noFailures(t, time.Time{})
	if i, _ := m.serving(t); i != "b" {
		t.Errorf("%q serves", i)
	}
	if got := strings.TrimSpace(m.must(t, "readlink",
		"/run/cri-proxy/kubelet.sock")); got != "/run/containerd/containerd.sock" {
		t.Errorf("kubelet.sock leads to %s", got)
	}
	m.must(t, "cri-proxy", "bypass", "off", "--restart-kubelet")
	m.moreCalls(t)
	m.noFailures(t, time.Time{})
}
