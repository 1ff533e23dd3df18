// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// maxAnswer bounds an answer: a Node lists its images and is some 100 KiB at the most.
const maxAnswer = 4 << 20

// Client speaks to an API server.
type Client struct {
	server string
	token  string
	user   string
	http   *http.Client
}

// New returns a client of the server at a URL. token may be empty.
func New(server, token string, c *http.Client) *Client {
	return &Client{server: server, token: token, http: c}
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// User is the name in the client certificate, such as system:node:NAME; empty without one.
func (c *Client) User() string { return c.user }

// Error is a refusal of the API server's.
type Error struct {
	// Code is that of HTTP.
	Code    int
	Message string
}

// Error says what the API server said.
func (e *Error) Error() string {
	return fmt.Sprintf("the API server answers %d: %s", e.Code, e.Message)
}

// IsCode reports whether err is an answer of that code.
func IsCode(err error, code int) bool {
	var refused *Error
	return errors.As(err, &refused) && refused.Code == code
}

// Do sends in, unless it is nil, as JSON, with PATCH as a merge patch, and reads the answer into
// out.
func (c *Client) Do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.server+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "cri-proxy")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err // names method and URL
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		var status struct {
			Message string `json:"message"`
		}
		if json.Unmarshal(answer, &status) != nil || status.Message == "" {
			status.Message = resp.Status
		}
		return &Error{resp.StatusCode, status.Message}
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}
