// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// The journal's file:
//
//	journal.db
//	├── meta
//	│   └── version                <varint>          the highest version ever written
//	├── operations
//	│   └── <uid>                  <Record, JSON>    has a version of its own; without one it is 1
//	├── overrides
//	│   └── <podUID>/<container>   <Override, JSON>
//	└── unreadable
//	    └── <uid>                  <bytes>           unreadable records, kept for people
//
// A Record:
//
//	version, boot                 who wrote it: schema, boot of the machine
//	operation, request, upgrade   protobuf: Operation, RestartRequest, PrepareUpgradeRequest
//	cancelled, committed          what the caller has said since
//	credentials, environments     that there were some; the values are never in the journal
//	containers[]
//	├── step                      how far it has come; see Step
//	├── sandbox, incumbent, successor, token, retried
//	├── method, stopFirst, grace, stopBy, holdSince, raised, joined, asked
//	├── postStarted, postDone
//	└── override                  the slot's image once kubelet is shown the successor
//
// The restart of one container makes seven writes: accepted, stage, staged, stop, started, reveal,
// and done, which is the end of the operation too. A preStop hook adds one (stopBy, before the
// hook), a postStart hook two (postStarted, postDone). Each container more adds six.
//
// A binary leaves alone what it does not understand, for a binary that does: see [Journal.Load]. A
// change that an older binary would misread (another meaning of a field or of a step, another order
// of the steps) needs a higher schemaVersion. A new step does not need one: an older binary does
// not know the step, and that is enough. The buckets overrides and unreadable are made when there
// is something to put into them, the others with the first write.

package store

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/cri-proxy/cri-proxy/ops/cgroup"
)

// schemaVersion is the version of what this binary writes.
const schemaVersion = 1

// Record is what the journal keeps of an operation.
type Record struct {
	// Version is the version of the schema; 0 means 1.
	Version int `json:"version,omitempty"`
	// Boot is the boot of the machine at the last write; empty if the kernel does not tell.
	Boot       string      `json:"boot,omitempty"`
	Operation  []byte      `json:"operation"` // opsv1.Operation
	Request    []byte      `json:"request"`   // opsv1.RestartRequest
	Containers []Container `json:"containers"`
	// Credentials is whether the command brought credentials for pulls. The journal never has them.
	Credentials bool `json:"credentials,omitempty"`
	// Environments names the containers whose environment the command has brought. The environments
	// themselves are in the records of this boot.
	Environments []string `json:"environments,omitempty"`
	// Cancelled is set once the operation has been cancelled. It stays set.
	Cancelled bool `json:"cancelled,omitempty"`
	// Upgrade is an opsv1.PrepareUpgradeRequest without credentials, if the operation is an
	// upgrade; Request is then made from it.
	Upgrade []byte `json:"upgrade,omitempty"`
	// CommitRequested is set once the caller of an upgrade has committed it.
	CommitRequested bool `json:"committed,omitempty"`
}

// Container is the journal's part of one container of an operation.
type Container struct {
	Step      Step   `json:"step"`
	Sandbox   string `json:"sandbox,omitempty"`
	Incumbent string `json:"incumbent,omitempty"`
	Successor string `json:"successor,omitempty"`
	// Token is the value of the successor's staged annotation.
	Token string `json:"token,omitempty"`
	// Retried is set once the successor has been staged a second time.
	Retried bool `json:"retried,omitempty"`
	// StopBy is when the grace period ends that preStop and the stop share.
	StopBy time.Time `json:"stopBy,omitzero"`
	// PostStarted is set once postStart has been tried, PostDone when it has ended well.
	PostStarted bool `json:"postStarted,omitempty"`
	PostDone    bool `json:"postDone,omitempty"`
	// Method is how the incumbent hands over to the successor.
	Method string `json:"method,omitempty"`
	// Override is what the slot has once kubelet is shown the successor; nil for none.
	Override *Override `json:"override,omitempty"`
	// Grace is how many seconds kubelet gave the incumbent of an upgrade to stop.
	Grace int64 `json:"grace,omitempty"`
	// HoldSince is since when an upgrade waits for its commit or, once it is armed, for kubelet.
	HoldSince time.Time `json:"holdSince,omitzero"`
	// Asked is set once kubelet has asked for the successor of an upgrade.
	Asked bool `json:"asked,omitempty"`
	// StopFirst is set once an operation that was to be StartFirst goes on as StopFirst.
	StopFirst bool `json:"stopFirst,omitempty"`
	// Raised is what is added to the pod's limit of memory while both containers run. It is set
	// before the limit is raised and cleared after the limit has been lowered.
	Raised *cgroup.Raise `json:"raised,omitempty"`
	// Joined is set once a stop of kubelet's has joined the restart.
	Joined bool `json:"joined,omitempty"`
}

// DecodeRecord reads the bytes of a record.
func DecodeRecord(b []byte) (*Record, error) {
	r := &Record{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, err
	}
	return r, nil
}

// foreign says why this binary must leave a record alone; r is nil if it could not be decoded.
func foreign(raw []byte, r *Record) string {
	var of struct{ Version int }
	if json.Unmarshal(raw, &of) == nil && of.Version > schemaVersion {
		return fmt.Sprintf("it was written by a newer cri-proxy (version %d of the journal, this one knows %d)",
			of.Version, schemaVersion)
	}
	if r == nil {
		return ""
	}
	for _, c := range r.Containers {
		if _, known := table[c.Step]; !known {
			return fmt.Sprintf("it is at step %q, which this cri-proxy does not know", c.Step)
		}
	}
	return ""
}
