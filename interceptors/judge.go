// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	"google.golang.org/grpc/metadata"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// Judge decides how containers are shown that carry a [view.StagedAnnotation] of which the view
// knows nothing: the journal with the operation that made them may be lost.
type Judge interface {
	// Judge returns once that is decided of all that the runtime has, at once if it was before.
	// Errors are the runtime's.
	Judge(ctx context.Context) error
}

// awaitJudge waits for the judge. Its error is the answer: what the runtime does not tell this
// process it does not tell the caller either. No list at all does less harm than one with a
// container too many or too few.
func (d *Director) awaitJudge(ctx context.Context) error {
	if d.judge == nil || !d.view.Unjudged() {
		return nil
	}
	if md, _ := metadata.FromIncomingContext(ctx); len(md[proxy.ProbeKey]) > 0 {
		return nil // the proxy's own probe, whose answer is empty: a runtime that is away is no fault of the proxy's
	}
	return d.judge.Judge(ctx)
}

// unaryJudged makes a method's calls wait for the judge, if its answers tell of containers.
func (d *Director) unaryJudged(m *method, take proxy.UnaryInterceptor) proxy.UnaryInterceptor {
	if !m.tells && !m.judged {
		return take
	}
	return func(ctx context.Context, method string, req []byte, next proxy.UnaryNext) ([]byte, error) {
		if err := d.awaitJudge(ctx); err != nil {
			return nil, err
		}
		return take(ctx, method, req, next)
	}
}

// streamJudged is unaryJudged for streams.
func (d *Director) streamJudged(m *method, take proxy.StreamInterceptor) proxy.StreamInterceptor {
	if !m.tells && !m.judged {
		return take
	}
	return func(ctx context.Context, method string, req []byte) ([]byte, proxy.StreamFilter, error) {
		if err := d.awaitJudge(ctx); err != nil {
			return nil, nil, err
		}
		return take(ctx, method, req)
	}
}
