// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import "context"

// Director decides, call by call, who answers. The proxy asks it once for every
// call before anything is read; the answer nil, which must be cheap, means that
// the bytes go through undecoded.
type Director interface {
	// Unary returns the interceptor for a call of a unary method, or nil.
	// method is the full name, such as /runtime.v1.RuntimeService/StopContainer.
	Unary(method string) UnaryInterceptor
	// Stream returns the interceptor for a call of a server-streaming method,
	// or nil.
	Stream(method string) StreamInterceptor
}

// UnaryInterceptor answers one unary call. req is the encoded request message and
// must not be kept or changed after return (copy what is needed); the result is
// the encoded response. next forwards to the runtime; it may be called with
// another request, more than once (the header and trailer of the last call are
// what the caller gets), or not at all.
//
// An error made by next, or a gRPC status error of the interceptor's own, is the
// call's answer; an error of next goes out as it came, whatever it was wrapped
// in. An interceptor that finds it cannot do its work, say because the bytes
// don't decode, returns a [*PassError]; then, as after a panic or an error that
// carries no status, the proxy answers what next answered if it was called, else
// forwards the original request, and counts a fault. next must not be called
// after the interceptor has returned.
type UnaryInterceptor func(ctx context.Context, method string, req []byte, next UnaryNext) ([]byte, error)

// UnaryNext forwards a request to the runtime with the caller's metadata and
// returns the encoded response, which is the interceptor's to keep. ctx bounds
// the upstream call, and may be detached from the caller's.
type UnaryNext func(ctx context.Context, req []byte) ([]byte, error)

// StreamInterceptor takes part in one server-streaming call. It is given the
// encoded request and returns the request to send upstream (normally req itself)
// and a filter, nil for none. Its errors are treated as a [UnaryInterceptor]'s.
type StreamInterceptor func(
	ctx context.Context, method string, req []byte,
) (upstreamReq []byte, filter StreamFilter, err error)

// StreamFilter sees every response message of one stream, in order, from one
// goroutine.
type StreamFilter interface {
	// Message returns the messages to send in place of msg: none drops it;
	// returning msg itself passes it unchanged. An error or a panic counts as a
	// fault and passes msg on.
	Message(msg []byte) ([][]byte, error)
	// Extra delivers messages that the filter wants sent out of turn. It is
	// asked once; a nil or closed channel means never. What is ready when the
	// runtime ends the stream is still sent.
	Extra() <-chan []byte
	// Close is called once when the stream is over.
	Close()
}

// PassError says that an interceptor could not do its work and the call shall go
// through unchanged.
type PassError struct{ Err error }

func (e *PassError) Error() string { return "interceptor passes: " + e.Err.Error() }

// Unwrap returns the cause.
func (e *PassError) Unwrap() error { return e.Err }

// Passer is implemented by a [Director] that must know when calls are over that
// went through undecoded.
type Passer interface {
	// Pass is asked after Unary answered nil. done, if not nil, is called when the call has been
	// answered. ok is false when the director has changed its mind: then Unary is asked again.
	Pass(method string) (done func(), ok bool)
}

// UnknownPasser is implemented by a [Director] that must know of calls whose methods are newer than
// the CRI that is linked here. They cannot be intercepted.
type UnknownPasser interface {
	// PassUnknown is asked before such a call is forwarded, and may wait, at most until ctx ends.
	// done, if not nil, is called when the call is over. Until then cut, which does not block, ends
	// it with Unavailable. ok is false when another director is about to be set, which is asked
	// then.
	PassUnknown(ctx context.Context, method string, cut func()) (done func(), ok bool)
}

// Dependency says how long a call depends on what its director knows.
type Dependency int

const (
	// UntilAnswered is for a call that depends on it until it has been answered.
	UntilAnswered Dependency = iota
	// UntilForwarded is for a call that depends on it until it has been forwarded: what comes back
	// goes out whatever has changed meanwhile.
	UntilForwarded
	// Independent is for a call that never depends on it, or that may be ended at any time.
	Independent
)

// Depender is implemented by a [Director] for [Server.Hold]. Without it every call of a known
// method depends on its director until it has been answered.
type Depender interface {
	// Dependency answers for a method. It never changes its mind.
	Dependency(method string) Dependency
}
