// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import "google.golang.org/protobuf/proto"

type protoMessage = proto.Message

// messageFilter is a [proxy.StreamFilter] that changes message by message.
type messageFilter struct {
	look *look
	// always has change called even if the look is blank.
	always bool
	// change returns the message to send instead, nil for none.
	change func(msg []byte) ([]byte, error)
}

// Message implements [proxy.StreamFilter].
func (f *messageFilter) Message(msg []byte) ([][]byte, error) {
	if !f.always && f.look.blank() {
		return [][]byte{msg}, nil
	}
	b, err := f.change(msg)
	if err != nil {
		return nil, err
	}
	if b == nil {
		return nil, nil
	}
	return [][]byte{b}, nil
}

// Extra implements [proxy.StreamFilter].
func (f *messageFilter) Extra() <-chan []byte { return nil }

// Close implements [proxy.StreamFilter].
func (f *messageFilter) Close() { f.look.end() }
