/*
 * What most files of the guest's kernel include, parsed once for all of them: see kernel-cc. The first three are those
 * that the kernel's own build puts before every file.
 */
#include <linux/compiler-version.h>
#include <linux/kconfig.h>
#include <linux/compiler_types.h>

#include <linux/blkdev.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/pagemap.h>
#include <linux/skbuff.h>
#include <linux/slab.h>
#include <linux/swap.h>
#include <net/ip.h>
#include <net/sock.h>
