// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package podsapi

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// Pod is what of a v1.Pod tells why kubelet stops its containers.
type Pod struct {
	UID string
	// Deleting is whether the pod has a deletion timestamp.
	Deleting bool
	// Phase and Reason are those of the status, kubelet's own: Failed and Evicted for an evicted pod before its containers
	// are stopped.
	Phase, Reason string
	// Images are the images of the spec's containers and init containers by container name, to the letter.
	Images map[string]string
}

// Field numbers of k8s.io/api/core/v1/generated.proto and k8s.io/apimachinery/pkg/apis/meta/v1/generated.proto.
// They never change; decoding these few by hand keeps the API's types, megabytes of code, out of the binary.
const (
	podMetadata, podSpec, podStatus = 1, 2, 3
	metaUID, metaDeletionTimestamp  = 5, 9
	specContainers                  = 2
	specInitContainers              = 20
	containerName, containerImage   = 1, 2
	statusPhase, statusReason       = 1, 4
)

func decodePod(b []byte) (*Pod, error) {
	p := &Pod{Images: map[string]string{}}
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
	err := eachField(b, func(n protowire.Number, v []byte) error {
		switch n {
		case containerName:
			name = string(v)
		case containerImage:
			image = string(v)
		}
		return nil
	})
	p.Images[name] = image
	return err
}

// eachField calls f with the number and the content of every field that is a string, bytes or a message.
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
