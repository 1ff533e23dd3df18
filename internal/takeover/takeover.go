// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package takeover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// The values of [Message.Want].
const (
	// WantState asks for the state. Answers: Waiting, any number of times, then Refused or Granted.
	// When the asker serves, it says Serving. If it goes away before, the state goes back.
	WantState = "state"
	// WantRedial asks the process to make every CRI client dial anew. Answer: Done.
	WantRedial = "redial"
)

// Message is one line of JSON. The two processes may have different versions: the names of the
// fields in JSON do not change.
type Message struct {
	Want    string `json:"want,omitempty"`
	Version string `json:"version,omitempty"` // of the asker

	Waiting string   `json:"waiting,omitempty"` // for what
	Refused string   `json:"refused,omitempty"` // why
	Granted *Granted `json:"yours,omitempty"`
	Serving bool     `json:"serving,omitempty"`
	Done    bool     `json:"done,omitempty"`
	// Remaining comes from the process that has given the state away, whenever it changes.
	Remaining *Remaining `json:"left,omitempty"`
}

// Granted comes with the state: nobody has it open any more.
type Granted struct {
	View      view.State `json:"view"`
	Remaining Remaining  `json:"left"`
}

// Remaining are kubelet's calls that the predecessor still answers.
type Remaining struct {
	Calls int `json:"calls"` // of any kind except event streams
	Pulls int `json:"pulls"`
	// Stops are the containers and sandboxes that calls are stopping.
	Stops []string `json:"stops,omitempty"`
}

// Conn is a connection between two processes.
type Conn struct {
	net.Conn
	in  *json.Decoder
	out *json.Encoder
}

func newConn(c net.Conn) *Conn {
	return &Conn{Conn: c, in: json.NewDecoder(c), out: json.NewEncoder(c)}
}

// sendTimeout bounds a write. A healthy process reads at once.
const sendTimeout = 5 * time.Second

// Send writes one message.
func (c *Conn) Send(m Message) error {
	if err := c.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	return c.out.Encode(m)
}

// Receive reads one message. It returns [io.EOF] when the other side is gone.
func (c *Conn) Receive() (Message, error) {
	var m Message
	err := c.in.Decode(&m)
	return m, err
}

// PID returns the process at the other end.
func (c *Conn) PID() (int, error) {
	u, ok := c.Conn.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	err = raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return int(cred.Pid), nil
}

// path is the socket in the state directory, which only root may enter. The files of this directory
// are the state.
func path(stateDir string) string { return filepath.Join(stateDir, "handover.sock") }

// Dial connects to the process that has the state; nil without error if there is none.
func Dial(ctx context.Context, stateDir string) (*Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path(stateDir))
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("the process that has the state: %w", err)
	}
	return newConn(c), nil
}

// Listener accepts connections of processes that ask for something.
type Listener struct{ net.Listener }

// Listen listens in the state directory.
func Listen(stateDir string) (*Listener, error) {
	l, err := proxy.Listen(path(stateDir), proxy.ListenOptions{Mode: 0o600, UID: -1, GID: -1})
	if err != nil {
		return nil, err
	}
	return &Listener{l}, nil
}

// Accept returns the next connection.
func (l *Listener) Accept() (*Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return newConn(c), nil
}

// Redial makes the clients of the process that has the state dial anew. It reports whether there is
// such a process.
func Redial(ctx context.Context, stateDir string) (bool, error) {
	c, err := Dial(ctx, stateDir)
	if c == nil || err != nil {
		return false, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := c.Send(Message{Want: WantRedial}); err != nil {
		return false, err
	}
	m, err := c.Receive()
	switch {
	case err != nil:
		return false, fmt.Errorf("no answer from cri-proxy: %w", err)
	case !m.Done:
		return false, errors.New(m.Refused)
	}
	return true, nil
}
