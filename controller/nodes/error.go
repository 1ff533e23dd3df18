// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// BypassedCondition is the type of the Node condition that says whether kubelet bypasses the node's
// cri-proxy.
const BypassedCondition corev1.NodeConditionType = "CRIProxyBypassed"

// Error is a command to a node that failed.
type Error struct {
	Node Node
	// Method is the RPC's name.
	Method string
	// Err carries the gRPC status.
	Err error
	// Silent says that the node gave no answer at all.
	Silent bool
}

// Error says what happened and, if the node did not answer, what to check.
func (e *Error) Error() string {
	message := status.Convert(e.Err).Message()
	switch {
	case e.Silent:
		return fmt.Sprintf("node %s does not answer at %s: %s (is cri-proxy running on the node, does it "+
			"listen there, "+
			"and does it trust this controller's certificate?)", e.Node.Name, e.Node.Address, message)
	case e.Code() == codes.PermissionDenied || e.Code() == codes.Unauthenticated:
		return fmt.Sprintf("node %s at %s refuses this controller: %s (is the name in the controller's certificate "+
			"on the node's list of allowed clients?)", e.Node.Name, e.Node.Address, message)
	case e.Code() == codes.Unimplemented:
		return fmt.Sprintf("cri-proxy on node %s does not know %s: %s (upgrade it)", e.Node.Name, e.Method, message)
	}
	return message
}

// Unwrap returns the gRPC status error.
func (e *Error) Unwrap() error { return e.Err }

// Code is the gRPC code.
func (e *Error) Code() codes.Code { return status.Code(e.Err) }

// Temporary says that the same call may succeed later: the node or its runtime is away, is busy, or
// refuses this controller.
func (e *Error) Temporary() bool {
	switch e.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.ResourceExhausted,
		codes.Aborted, codes.Internal, codes.Unknown, codes.Unauthenticated, codes.PermissionDenied:
		return true
	}
	return false
}

// Refused says that nothing listens at the node's address, although the node's kernel answered.
func (e *Error) Refused() bool {
	return e.Silent && strings.Contains(status.Convert(e.Err).Message(), "connection refused")
}

// Bypassed says that the node refuses commands because kubelet bypasses its cri-proxy. The message
// says since when and why.
func (e *Error) Bypassed() bool {
	for _, detail := range status.Convert(e.Err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetReason() == opsv1.ErrorReasonBypassed {
			return true
		}
	}
	return false
}

// Code returns the gRPC code of an [Error], else codes.Unknown.
func Code(err error) codes.Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code()
	}
	return codes.Unknown
}

// NotFound says that the node does not know what the command was about.
func NotFound(err error) bool { return Code(err) == codes.NotFound }

// Reason returns the CamelCase reason that the node gave with an [Error], else "".
func Reason(err error) string {
	var e *Error
	if !errors.As(err, &e) {
		return ""
	}
	for _, detail := range status.Convert(e.Err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}
