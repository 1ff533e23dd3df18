// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view_test

import (
	"bytes"
	"encoding/json"
	"slices"
	"testing"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// exported is what a process of another version sends. Its keys and numbers must not change.
const exported = `{
  "heirs": {
    "aaaa000011": {
      "id": "bbbb000022",
      "sandbox": "5b5b5b5b01",
      "slot": {
        "PodUID": "uid-1",
        "Container": "app"
      },
      "late": true,
      "grace": 30
    }
  },
  "untold": {
    "aaaa000011": {
      "id": "bbbb000022",
      "sandbox": "5b5b5b5b01",
      "heard": 2,
      "round": true,
      "since": "2026-11-30T22:00:00Z"
    }
  },
  "stops": [
    "5b5b5b5b02",
    "cccc000033"
  ]
}`

// A view knows what another one has exported, whose version may be another.
func TestStateCrossesVersions(t *testing.T) {
	var st view.State
	if err := json.Unmarshal([]byte(exported), &st); err != nil {
		t.Fatal(err)
	}
	v := view.New()
	v.Import(st)
	if !v.Active() {
		t.Error("an unacknowledged successor does not make the view active")
	}
	if got := v.Unacknowledged("aaaa000011"); got != "bbbb000022" {
		t.Errorf("unacknowledged successor %q", got)
	}
	if got := v.StoppedAfterReveal(slot); got != "bbbb000022" {
		t.Errorf("the container of the slot is %q", got)
	}
	in := v.StoppedAfterRevealIn("5b5b5b5b01")
	if want := []view.Successor{{ID: "bbbb000022", Grace: 30}}; !slices.Equal(in, want) {
		t.Errorf("successors in the sandbox: %v, want %v", in, want)
	}
	for _, id := range st.Stops { // the other process's, until this one has them itself
		defer v.StopBegins(id)()
	}
	got, err := json.MarshalIndent(v.Export(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, []byte(exported)) {
		t.Errorf("exported:\n%s\nwant:\n%s", got, exported)
	}
	// The step that was exported counts: what is missing are the sandbox's status and the
	// successor's, in that order.
	v.AckStatus("bbbb000022")
	if v.Unacknowledged("aaaa000011") == "" {
		t.Error("acknowledged before the sandbox's status was asked for")
	}
	v.AckSandboxStatus("5b5b5b5b01")
	// The step that was exported counts: what is missing are the sandbox's status and the
	// successor's, in that order.
	v.AckStatus("bbbb000022")
	if v.Unacknowledged("aaaa000011") != "" || v.Active() {
		t.Error("not acknowledged")
	}
}
