// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package yield_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cri-proxy/cri-proxy/ops/prepull/yield"
)

// pullsOf returns pulls of kubelet's that are old enough to be looked at.
func pullsOf(images ...string) []*yield.KubeletPull {
	k := yield.NewKubeletPulls()
	for _, image := range images {
		k.Begin(image)
	}
	time.Sleep(time.Second)
	return k.Lasting(time.Now())
}

// With a runtime that tells nothing, pulls pause as long as kubelet pulls, and at most MaxPause.
func TestLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pulls := pullsOf("nginx")
		var line yield.Line
		blind := yield.Seen{Blind: true}
		look := func(after time.Duration, on, changes bool) {
			t.Helper()
			time.Sleep(after)
			if changed := line.Decide(time.Now(), blind, false, pulls); changed != changes || line.Pause().On() != on {
				t.Errorf("changed %v, on %v", changed, line.Pause().On())
			}
		}
		look(0, true, true)
		if turned := line.Turned(); !turned.Equal(time.Now()) {
			t.Errorf("turned %s ago", time.Since(turned))
		}
		look(yield.MaxPause-time.Second, true, false)
		look(time.Second, false, true)
		look(yield.MaxPause-time.Second, false, false)
		look(time.Second, true, true)
		// A pause that kubelet has ended counts, at least for what it costs.
		for range int(yield.MaxPause/yield.CutCost) - 1 {
			line.End(time.Now())
			look(0, true, true)
		}
		line.End(time.Now())
		look(0, false, false)
	})
}

func TestLayers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pulls := pullsOf("nginx")
		var layers yield.Layers
		decide := func(after time.Duration, wanted, come, on bool) {
			t.Helper()
			time.Sleep(after)
			layers.Decide(time.Now(), wanted, come, pulls)
			if layers.Pause().On() != on {
				t.Errorf("on %v", layers.Pause().On())
			}
		}
		decide(0, false, false, false)
		decide(0, true, false, true)
		// Bytes that come extend the pause.
		decide(yield.MaxPause-time.Second, true, true, true)
		decide(yield.MaxPause-time.Second, true, false, true)
		decide(time.Second, true, false, false)
		decide(yield.MaxPause-time.Second, true, true, false) // it goes on in any case
		decide(time.Second, true, true, true)
		decide(0, false, true, false)
	})
}

// A message tells nobody what kubelet pulls for others.
func TestMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct{ kubelets, whose string }{
			{"nginx", "the same image"}, {"secret-project", "another image"}, {"", "an image"},
		} {
			var line yield.Line
			line.Decide(time.Now(), yield.Seen{Blind: true}, false, pullsOf(tt.kubelets))
			message := line.Pause().Message("docker.io/library/nginx:latest")
			if !strings.HasPrefix(message, "yields to kubelet's pull of "+tt.whose+" since ") ||
				strings.Contains(message, "secret") {
				t.Errorf("%s: %s", tt.kubelets, message)
			}
		}
	})
}
