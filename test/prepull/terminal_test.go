// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// terminal is what a person looks at, with as much of a terminal's control sequences as the command
// uses.
type terminal struct {
	t      *testing.T
	person *os.File
	lines  []string
	cursor int // line
	rest   string
	// each is called with the screen whenever something was drawn.
	each func(screen []string)
}

// newTerminal returns a terminal and the side of it that a program gets.
func newTerminal(t *testing.T, columns, rows uint16) (term *terminal, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	t.Cleanup(func() { _ = person.Close() })
	fd := int(person.Fd())
	must(t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	must(t, err)
	must(t, unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}))
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	t.Cleanup(func() { _ = program.Close() })
	return &terminal{t: t, person: person, lines: []string{""}}, program
}

// run runs a command on the terminal, as its foreground process, to its end.
func (s *terminal) run(cmd *exec.Cmd, program *os.File) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = program, program, program
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	must(s.t, cmd.Start())
	must(s.t, program.Close()) // so that reading ends with the command
	b := make([]byte, 4096)
	for {
		n, err := s.person.Read(b)
		s.draw(string(b[:n]))
		if errors.Is(err, io.EOF) || errors.Is(err, unix.EIO) { // EIO is how Linux says that nobody has the other side
			return cmd.Wait()
		}
		must(s.t, err)
	}
}

var sequence = regexp.MustCompile(`^\x1b\[(\??)(\d*)([A-Za-z])`)

func (s *terminal) draw(text string) {
	text, s.rest = s.rest+text, ""
	for text != "" {
		if m := sequence.FindStringSubmatch(text); m != nil {
			text = text[len(m[0]):]
			switch n, _ := strconv.Atoi(m[2]); m[3] {
			case "A":
				s.cursor = max(0, s.cursor-n)
			case "J":
				s.lines = append(s.lines[:s.cursor], "")
			case "h", "l":
				if m[2] == "7" && m[3] == "h" && s.each != nil {
					s.each(s.lines)
				}
			default:
				s.t.Errorf("the terminal does not know %q", m[0])
			}
			continue
		}
		switch c := text[0]; c {
		case '\x1b':
			s.rest = text
			return
		case '\n':
			s.cursor++
			if s.cursor == len(s.lines) {
				s.lines = append(s.lines, "")
			}
		case '\r':
		default:
			s.lines[s.cursor] += string(c)
		}
		text = text[1:]
	}
}

var bar = regexp.MustCompile(`^  [0-9a-f]{12} \[(=*)(>? *)\] +(\d+) %  .* of 8\.0 MiB$`)

// TestOnTerminal has a person watch a pull, and another one press ^C.
func TestOnTerminal(t *testing.T) {
	f := newFront(t, "terminal.test")
	p := push(t, "terminal:1", 4, 8)
	image := f.image(p.name)
	t.Run("bars", func(t *testing.T) {
		f.throttle(wire / 4)
		screen, program := newTerminal(t, 100, 30)
		partial, grew := 0, 0
		last := map[int]int{}
		screen.each = func(lines []string) {
			shown := 0
			for i, l := range lines {
				m := bar.FindStringSubmatch(l)
				if m == nil {
					continue
				}
				shown++
				percent, _ := strconv.Atoi(m[3])
				if percent < last[i] {
					t.Errorf("a layer goes back from %d to %d %%", last[i], percent)
				}
				if percent > last[i] {
					grew++
				}
				last[i] = percent
				if full := len(m[1]); full > 0 && m[2] != "" {
					partial++
					if whole := full + len(m[2]); full != percent*whole/100 && full != (percent+1)*whole/100 {
						t.Errorf("%d of %d for %d %%", full, whole, percent)
					}
				}
			}
			if shown != 0 && (shown != 4 || !strings.HasPrefix(lines[0], image+"  ") || len(lines) != 6) {
				t.Errorf("the screen is\n%s", strings.Join(lines, "\n"))
			}
		}
		if err := screen.run(ctl(t, "pull", image), program); err != nil {
			t.Error(err)
		}
		begin(t, &opsv1.PullRequest{Image: image}) // removes the image in the end
		if partial < 3 || grew < 6 {
			t.Errorf("%d bars were partly full, %d times one grew", partial, grew)
		}
		if got := strings.Join(screen.lines, "\n"); got != image+"  Succeeded (Pulled)\n" {
			t.Errorf("in the end the screen is\n%s", got)
		}
	})
	t.Run("interrupted from the keyboard", func(t *testing.T) {
		q := push(t, "terminal:2", 4, 8)
		f.throttle(4 * mib)
		screen, program := newTerminal(t, 100, 30)
		pressed := false
		screen.each = func(lines []string) {
			if !pressed && len(lines) > 4 && bar.MatchString(lines[1]) {
				pressed = true
				_, err := screen.person.WriteString("\x03")
				must(t, err)
			}
		}
		err := screen.run(ctl(t, "pull", f.image(q.name)), program)
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("ended with %v", err)
		}
		if got := strings.Join(screen.lines, "\n"); !strings.Contains(got, "was cancelled: cancelled by ctl/alice") {
			t.Errorf("the screen is\n%s", got)
		}
		if present(t, f.image(q.name)) != nil {
			t.Error("nothing was cancelled")
		}
	})
	t.Run("no terminal", func(t *testing.T) {
		q := push(t, "terminal:3", 4, 8)
		f.throttle(wire / 4)
		out := output(t, "pull", f.image(q.name))
		begin(t, &opsv1.PullRequest{Image: f.image(q.name)}) // as above
		for line := range strings.Lines(out) {
			if !regexp.MustCompile(`^\d\d:\d\d:\d\d\.\d{3} ` + regexp.QuoteMeta(f.image(q.name)) + ` \w.*\n$`).
				MatchString(line) {
				t.Errorf("a line is %q", line)
			}
		}
		if strings.Contains(out, "\x1b") || strings.Count(out, " Fetching") < 3 || !strings.Contains(out, "MiB/s") {
			t.Errorf("got %s", out)
		}
	})
}
