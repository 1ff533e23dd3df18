// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package podsapi

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// Timeout bounds a question for kubelet's mind: a call of kubelet's may wait for the answer.
const Timeout = 500 * time.Millisecond

// Pods is kubelet's own view of its pods. A [*Client] is one.
type Pods interface {
	// Pod returns the pod with that UID. [ErrNotFound] means that kubelet has none.
	Pod(ctx context.Context, uid string) (*Pod, error)
}

// Pod is what of a v1.Pod tells why kubelet stops its containers.
type Pod struct {
	UID string
	// Deleting is whether the pod has a deletion timestamp.
	Deleting bool
	// Phase and Reason are those of the status, kubelet's own: Failed and Evicted for an evicted
	// pod before its containers are stopped.
	Phase, Reason string
	// Images are the images of the spec's containers and init containers by container name, to the
	// letter.
	Images map[string]string
	// StartupPeriods are the periods of the startup probes of those containers, by container name,
	// of those that have one.
	StartupPeriods map[string]time.Duration
	// Running are the IDs of those containers by which kubelet goes, as in the status
	// ("containerd://..."), by container name.
	Running map[string]string
}

// Leaving says why the pod goes away; empty if it does not, as far as kubelet knows.
func (p *Pod) Leaving() string {
	switch {
	case p.Deleting:
		return "the pod is being deleted"
	case p.Phase == "Failed" || p.Phase == "Succeeded":
		return strings.TrimSpace("the pod has ended: " + p.Phase + " " + p.Reason)
	default:
		return ""
	}
}

// Field numbers of k8s.io/api/core/v1/generated.proto and
// k8s.io/apimachinery/pkg/apis/meta/v1/generated.proto. They never change; decoding these few by
// hand keeps the API's types, megabytes of code, out of the binary.
const (
	podMetadata, podSpec, podStatus = 1, 2, 3
	metaUID, metaDeletionTimestamp  = 5, 9
	specContainers                  = 2
	specInitContainers              = 20
	containerName, containerImage   = 1, 2
	containerStartupProbe           = 22
	probePeriodSeconds              = 4
	statusPhase, statusReason       = 1, 4
	statusContainers                = 8
	statusInitContainers            = 10
	containerStatusName             = 1
	containerStatusID               = 8
)

func decodePod(b []byte) (*Pod, error) {
	p := &Pod{Images: map[string]string{}, StartupPeriods: map[string]time.Duration{}, Running: map[string]string{}}
	err := eachField(b, func(n protowire.Number, v []byte) error {
		switch n {
		case podMetadata:
			return eachField(v, func(n protowire.Number, v []byte) error {
				switch n {
				case metaUID:
					p.UID = string(v)
				case metaDeletionTimestamp:
					p.Deleting = true
				}
				return nil
			})
		case podSpec:
			return eachField(v, func(n protowire.Number, v []byte) error {
				if n != specContainers && n != specInitContainers {
					return nil
				}
				return p.container(v)
			})
		case podStatus:
			return eachField(v, func(n protowire.Number, v []byte) error {
				switch n {
				case statusPhase:
					p.Phase = string(v)
				case statusReason:
					p.Reason = string(v)
				case statusContainers, statusInitContainers:
					return p.status(v)
				}
				return nil
			})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Pod) container(b []byte) error {
	var name, image string
	var period uint64
	startup := false
	err := eachField(b, func(n protowire.Number, v []byte) error {
		switch n {
		case containerName:
			name = string(v)
		case containerImage:
			image = string(v)
		case containerStartupProbe:
			var err error
			period, err = numberIn(v, probePeriodSeconds)
			startup = true
			return err
		}
		return nil
	})
	p.Images[name] = image
	if startup {
		p.StartupPeriods[name] = time.Duration(period) * time.Second
	}
	return err
}

func (p *Pod) status(b []byte) error {
	var name, id string
	err := eachField(b, func(n protowire.Number, v []byte) error {
		switch n {
		case containerStatusName:
			name = string(v)
		case containerStatusID:
			id = string(v)
		}
		return nil
	})
	p.Running[name] = id
	return err
}

// numberIn returns the field of a message that is a number; 0 if it is not set.
func numberIn(b []byte, field protowire.Number) (value uint64, err error) {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return 0, protowire.ParseError(n)
		}
		b = b[n:]
		if number == field && kind == protowire.VarintType {
			if value, n = protowire.ConsumeVarint(b); n < 0 {
				return 0, protowire.ParseError(n)
			}
		} else if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
			return 0, fmt.Errorf("field %d: %w", number, protowire.ParseError(n))
		}
		b = b[n:]
	}
	return value, nil
}

// eachField calls f with the number and the content of every field that is a string, bytes or a
// message.
func eachField(b []byte, f func(protowire.Number, []byte) error) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
				return fmt.Errorf("field %d: %w", number, protowire.ParseError(n))
			}
			b = b[n:]
			continue
		}
		v, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return fmt.Errorf("field %d: %w", number, protowire.ParseError(n))
		}
		b = b[n:]
		if err := f(number, v); err != nil {
			return err
		}
	}
	return nil
}
