// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pages lists objects of the API server page by page.
package pages

import (
	"context"
	"errors"
	"fmt"

	"sigs.k8s.io/controller-runtime/pkg/client"
)

// pageSize is how many objects one answer of the API server has.
const pageSize = 500

// Each calls f with all objects of a kind, page by page. It goes on after an error of f, and
// ignores objects that do not exist any more.
func Each[L client.ObjectList, T any](
	ctx context.Context, c client.Client, list L, items func(L) []T, f func(*T) error,
) error {
	var errs []error
	for {
		if err := c.List(ctx, list, client.Limit(pageSize), client.Continue(list.GetContinue())); err != nil {
			return errors.Join(append(errs, err)...)
		}
		page := items(list)
		for i := range page {
			if err := client.IgnoreNotFound(f(&page[i])); err != nil {
				if o, ok := any(&page[i]).(client.Object); ok {
					err = fmt.Errorf("%s: %w", client.ObjectKeyFromObject(o), err)
				}
				errs = append(errs, err)
			}
		}
		if list.GetContinue() == "" {
			return errors.Join(errs...)
		}
	}
}
