// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cri-proxy/cri-proxy/cmd/cri-proxy/ctl"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/version"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run executes the command line and returns the exit code: 1 if the command failed, 2 if the
// command line or the configuration is wrong.
func run(args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if err == nil {
		return 0
	}
	fmt.Fprintln(stderr, "cri-proxy:", err)
	if coded, ok := errors.AsType[interface {
		error
		ExitCode() int
	}](err); ok {
		return coded.ExitCode()
	}
	return 1
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "cri-proxy",
		Short:         "Transparent CRI proxy that restarts containers in place",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return &config.InvalidError{Err: fmt.Errorf("%w; see %s --help", err, c.CommandPath())}
	})
	root.AddCommand(
		newServe(), newInstall(), newUninstall(), newInstaller(), newSelfUpdate(), newBypass(),
		ctl.Command(time.Now), newConfig(), newVersion(),
	)
	checkArgs(root)
	hintAtNewNames(root)
	return root
}

// checkArgs makes wrong arguments of c and of the commands below it usage errors. Commands that
// only group others get an answer to an unknown name; cobra has it for the root only.
func checkArgs(c *cobra.Command) {
	if c.HasSubCommands() {
		c.SuggestionsMinimumDistance = 2
		c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
		c.Args = func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			hint := "see " + c.CommandPath() + " --help"
			if near := c.SuggestionsFor(args[0]); len(near) > 0 {
				hint = "did you mean " + strings.Join(near, " or ") + "?"
			}
			return fmt.Errorf("unknown command %q for %q, %s", args[0], c.CommandPath(), hint)
		}
	}
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return &config.InvalidError{Err: err}
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		checkArgs(sub)
	}
}

// hintAtNewNames makes c and the commands below it say on standard error that they, or flags, were
// called by old names. Standard output is for the answer alone.
func hintAtNewNames(c *cobra.Command) {
	if run := c.RunE; run != nil {
		c.RunE = func(c *cobra.Command, args []string) error {
			if called := c.CalledAs(); called != c.Name() {
				old := c.Parent().CommandPath() + " " + called
				fmt.Fprintf(c.ErrOrStderr(), "hint: %s is now %s\n", old, c.CommandPath())
			}
			c.Flags().Visit(func(f *pflag.Flag) {
				if name := config.FlagName(f); name != f.Name {
					fmt.Fprintf(c.ErrOrStderr(), "hint: --%s is now --%s\n", f.Name, name)
				}
			})
			return run(c, args)
		}
	}
	for _, sub := range c.Commands() {
		hintAtNewNames(sub)
	}
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this binary",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(c.OutOrStdout(), version.Long())
			return err
		},
	}
}

func newConfig() *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "Check configuration files"}
	cmd.AddCommand(&cobra.Command{
		Use:   "check FILE",
		Short: "Check a configuration file and print its errors",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			cfg := config.Default()
			if err := cfg.Load(args[0], nil); err != nil {
				return err
			}
			if err := cfg.Validate(); err != nil {
				return &config.InvalidError{Err: fmt.Errorf("%s: %w", args[0], err)}
			}
			_, err := fmt.Fprintf(c.OutOrStdout(), "%s: ok\n", args[0])
			return err
		},
	})
	return cmd
}
